"""`python -m fused_dlam` is `fused-dlam`."""

import sys

from .tools.cli import main

if __name__ == "__main__":  # worker processes import this module too
    sys.exit(main())
