"""`python -m srppo`: the command line, for scripts that must use this very interpreter."""

from srppo.cli.app import main

if __name__ == "__main__":
    main()
