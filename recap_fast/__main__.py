"""The command `recap-fast`, which is also `python -m recap_fast`.

Apart from the command line, so that an installation without its requirements says what it lacks.
"""

from __future__ import annotations

import sys

from recap_fast.lazy import missing


def main() -> None:
    """Entry point."""
    try:
        from recap_fast.cli import main as run
    except ModuleNotFoundError as error:
        print(missing("recap-fast", error), file=sys.stderr)
        raise SystemExit(2) from None
    run()


if __name__ == "__main__":
    main()
