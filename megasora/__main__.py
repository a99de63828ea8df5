"""`python -m megasora`."""

from megasora.cli import main

if __name__ == "__main__":
    main()
