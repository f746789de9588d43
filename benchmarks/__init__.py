"""Benchmarks: python -m benchmarks.<name> prints a table and keeps a JSON in benchmarks/results."""
