"""The `sslvit` command, also available as `python -m sslvit`."""

import sys


def main() -> int:
    """Run the command line; Ctrl-C while modules are still loading prints one line instead of a traceback."""
    try:
        from sslvit.cli import main as run
    except KeyboardInterrupt:
        print("sslvit: interrupted; nothing was begun", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
