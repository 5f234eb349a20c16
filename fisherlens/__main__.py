"""``python -m fisherlens``: the command line."""

from fisherlens.cli import main

if __name__ == "__main__":
    main()
