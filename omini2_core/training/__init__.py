"""Trains condition LoRAs for FLUX.1: ``python -m omini2_core.training CONFIG.yaml``.

Needs the ``train`` extra of pyproject.toml. Nothing that ComfyUI loads at its start imports this
package: diffusers, peft and accelerate stay out of the graph editor.

Data flows one way: ``config`` -> ``data`` (undecoded samples) -> ``conditions``, ``encode``
(latents and text features, cached) -> ``batches`` (what is drawn for each sample) -> ``branch``
(the model) -> ``loop`` -> ``checkpoints``, ``lora_file``. Everything random follows from the seed
and the sample's number alone (a condition that fades in also from the step), so neither a resume
nor the number of processes changes a run.
"""
