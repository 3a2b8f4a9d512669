"""``python -m phirt``, for where the ``phirt`` command is not on the path."""

import sys

from phirt.cli import main

if __name__ == "__main__":
    sys.exit(main())
