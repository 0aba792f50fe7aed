"""Inputs of Omini2 Train LoRA for a run of three steps."""

VALUES = {
    "base": "the demo model", "images": "shapes", "condition": "grey", "condition_folder": "none",
    "attention": "independent", "size": 64, "compression": 0.5, "delta_rows": 0, "delta_cols": 0,
    "steps": 3, "batch_size": 1, "rank": 2, "optimizer": "adamw", "learning_rate": 1e-3,
    "quantize": "none", "checkpoint_every": 2, "seed": 0, "lora_name": "mine", "resume": True,
}  # fmt: skip
