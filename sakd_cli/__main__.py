"""`python -m sakd_cli` is `sakd`."""

from sakd_cli.cli.app import main

main()
