"""`python -m sslvit`: the command."""

import sys

from sslvit.cli import main

if __name__ == "__main__":
    sys.exit(main())
