"""The paper's experiments in small, on the demo model: `python -m benchmarks.study`."""
