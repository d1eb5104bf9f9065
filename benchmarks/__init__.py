"""Measures Carrel, each figure beside the bare Agent SDK in the same run: `python -m benchmarks`."""
