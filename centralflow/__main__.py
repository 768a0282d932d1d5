"""`python -m centralflow`, and the entry point of the command `centralflow`."""

from .cli.main import app as app
from .cli.main import main as main

if __name__ == "__main__":
    main()
