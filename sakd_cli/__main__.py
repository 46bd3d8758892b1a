"""`sakd`, which is `python -m sakd_cli`."""

import sys


def main() -> None:
    """Run a command; a Ctrl-C while the commands are being imported costs one line, as any other."""
    try:
        from sakd_cli.cli.app import main as carry_out
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)
    carry_out()


if __name__ == "__main__":
    main()
