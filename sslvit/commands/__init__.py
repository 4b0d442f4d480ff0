"""The commands: each imports what it needs, calls it and prints. Looking at these files costs no torch."""
