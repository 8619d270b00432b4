"""`python -m onnxprune`, and the command `onnxprune`."""

from __future__ import annotations

import sys


def main() -> None:
    """The command line. Ctrl-C while it is being loaded ends it without a traceback, too."""
    try:
        from onnxprune.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
