"""OminiControl2's condition branches for ComfyUI's own FLUX.1 (arXiv 2503.08280).

Data flows one way: image -> condition -> tokens -> branch -> K/V -> attention.
"""
