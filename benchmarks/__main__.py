"""All benchmarks: `python -m benchmarks`; they share their options."""

from benchmarks import compact, reuse

for benchmark in (reuse, compact):
    benchmark.main()
