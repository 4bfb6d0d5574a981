"""python -m marsclf COMMAND: see marsclf.cli."""

import sys

# Before any import of what an older Python cannot read.
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"error: marsclf needs Python 3.11 to 3.13, not {sys.version.split()[0]}.")

from marsclf.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
