"""The same as `megasora convert`, for those who look for a script."""

import sys

from megasora.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
