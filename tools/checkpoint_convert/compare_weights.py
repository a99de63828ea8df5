"""The same as `megasora compare`, for those who look for a script."""

import sys

from megasora.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
