"""`python -m aletheia_tune` is the `aletheia` command."""

from aletheia_tune.cli import main

if __name__ == "__main__":
    main()
