"""`python -m finback`: the same program as the `finback` script."""

import sys

from finback.cli import main

if __name__ == "__main__":
    sys.exit(main())
