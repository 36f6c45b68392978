"""`python -m fastdiff`: the command line."""

import sys

from fastdiff.cli import main

if __name__ == "__main__":
    sys.exit(main())
