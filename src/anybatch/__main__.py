"""`python -m anybatch`: the same as the command."""

from anybatch.cli import main

main()
