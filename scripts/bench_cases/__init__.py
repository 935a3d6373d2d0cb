"""The parts of scripts/bench.py, a measurement in each."""
