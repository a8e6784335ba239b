"""Speed, memory and reliability figures, each beside its bare peer in the same run: `python -m benchmarks.NAME --json`."""
