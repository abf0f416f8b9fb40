"""python -m triform PROGRAM: the same as the console command."""

import sys

from triform.console import main

if __name__ == "__main__":
    sys.exit(main())
