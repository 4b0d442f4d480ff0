"""A run: Trainer assembly, run folder, callbacks."""
