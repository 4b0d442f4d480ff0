"""The parts of tools/device_day.py, one module each; each runs in its own process."""
