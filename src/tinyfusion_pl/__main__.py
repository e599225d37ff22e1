"""``python -m tinyfusion_pl``."""

import sys

from tinyfusion_pl.cli import main

if __name__ == "__main__":
    sys.exit(main())
