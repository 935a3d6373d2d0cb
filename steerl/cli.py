"""The command line: `steerl NAME ...` is `python scripts/....py ...`."""
