"""All benchmarks: `python -m benchmarks`; they share their options."""

from benchmarks import compact, easycontrol, reuse

for benchmark in (reuse, compact, easycontrol):
    benchmark.main()
