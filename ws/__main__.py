"""`python -m ws`: the same as the command `ws`."""

from ws.cli import main

if __name__ == "__main__":
    main()
