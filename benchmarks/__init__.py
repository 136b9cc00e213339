"""Timings against peers: `python -m benchmarks`. See README.md in this folder."""
