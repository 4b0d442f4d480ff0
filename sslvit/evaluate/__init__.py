"""Encoder -> numbers, without a Trainer."""
