"""FLUX.1 at its true size on a GPU that isn't there: `python -m benchmarks.simulate`.

The real nodes, ComfyUI's own loader and sampler, on tensors that have a device, a format and a
shape, but no numbers. So mixed devices fail as on a GPU, and memory, copies, waits, kernels and
arithmetic can be counted, on any card and in seconds.
"""
