"""All benchmarks: `python -m benchmarks`; they share their options."""

from benchmarks import compact, easycontrol, performance

for benchmark in (compact, easycontrol, performance):
    benchmark.main()
