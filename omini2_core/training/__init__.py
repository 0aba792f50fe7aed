"""Trains condition LoRAs for FLUX.1: ``python -m omini2_core.training CONFIG.yaml``.

Needs the ``train`` extra of pyproject.toml. Nothing that ComfyUI loads at its start imports this
package: diffusers, peft and accelerate stay out of the graph editor.
"""
