"""The `sslvit` command, also as `python -m sslvit`."""

import sys


def main() -> int:
    """Run the command that was typed; whoever stops it while its modules are loaded gets one line."""
    try:
        from sslvit.cli import main as run
    except KeyboardInterrupt:
        print("sslvit: interrupted; nothing was begun", file=sys.stderr)
        return 130
    return run()


if __name__ == "__main__":
    sys.exit(main())
