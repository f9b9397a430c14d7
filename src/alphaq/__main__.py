"""`python -m alphaq`."""

from alphaq.cli import main

main()
