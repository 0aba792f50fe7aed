"""What conditions cost, measured: `python -m benchmarks` or `make bench`."""

import os

# Threads that wait sleep instead of spinning, which beside other programs makes each step up to
# four times longer. Read when torch is imported, which this package's modules do after this.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
