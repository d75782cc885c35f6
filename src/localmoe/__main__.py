"""`python -m localmoe` is the `localmoe` command."""

from localmoe.cli.main import main

if __name__ == "__main__":
    main()
