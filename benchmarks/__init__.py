"""Measurements. Each module is a command, `python -m benchmarks.<name>`, and writes a file into benchmarks/results."""
