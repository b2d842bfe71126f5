"""`python -m kvmmm`: the command line."""

from kvmmm.cli import main

if __name__ == "__main__":
    main()
