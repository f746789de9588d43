"""Benchmarks: python -m benchmarks.<name> prints a table and keeps a JSON in benchmarks/results."""

import os

# A notebook hands down its own, which need not be installed here.
os.environ["MPLBACKEND"] = "Agg"
