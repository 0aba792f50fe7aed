"""OminiControl2's condition branches for ComfyUI's own FLUX.1 (arXiv 2503.08280).

Data flows one way: image -> condition -> tokens -> branch -> K/V -> attention. A folder imports
only what stands before it::

    errors, files, digest <- tokens <- lora, cache <- engine <- flux1 <- host, demo <- nodes

``training`` lies on top, apart from the nodes; only it, ``host`` and ``demo`` import ComfyUI. A
*source* of K/V is what the engine asks for keys and values: a condition's own branch, or a file.
A *chunk* is one prompt's rows of a batch.
"""
