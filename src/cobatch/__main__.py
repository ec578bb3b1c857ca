"""`python -m cobatch`: the command line."""

from cobatch.server.cli import main

if __name__ == "__main__":
    main()
