"""`python -m alphaq`."""

from alphaq.cli.app import main

main()
