"""The same as `megasora inspect`, for those who look for a script."""

import sys

from megasora.cli import main

if __name__ == "__main__":
    main(["inspect", *sys.argv[1:]])
