"""Measurements: `python -m benchmarks.<name>` writes a file into benchmarks/results."""
