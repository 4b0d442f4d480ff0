"""The commands. Each imports its function when it runs, so that importing these modules does not import torch."""
