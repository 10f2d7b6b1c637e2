"""`python -m translator` is `serval-translator`."""

from translator.cli import main

main()
