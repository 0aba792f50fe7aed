"""All benchmarks: `python -m benchmarks`; they share their options."""

from benchmarks import compact, easycontrol, performance, reuse

for benchmark in (reuse, compact, easycontrol, performance):
    benchmark.main()
