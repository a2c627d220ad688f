"""Measurements, each with its table: `python -m benchmarks.smoothing` and its neighbours."""
