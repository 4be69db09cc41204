"""The benchmarks that `scripts/benchmark.py` runs, one module each."""
