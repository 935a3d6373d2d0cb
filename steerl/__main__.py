"""`python -m steerl`: the command line."""

from steerl.cli import main

main()
