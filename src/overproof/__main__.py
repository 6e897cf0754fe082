"""`python -m overproof`."""

from overproof.cli import main

if __name__ == "__main__":
    main()
