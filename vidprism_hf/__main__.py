"""`python -m vidprism_hf COMMAND ...`: the command line where its script is not on the path."""

import sys

from vidprism_cli import main

if __name__ == "__main__":
    sys.exit(main())
