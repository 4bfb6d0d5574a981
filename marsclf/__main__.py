"""python -m marsclf COMMAND: see marsclf.cli."""

import sys

from marsclf.cli import main

if __name__ == "__main__":
    sys.exit(main())
