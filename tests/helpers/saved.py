"""Omini2 Save Cache and Omini2 Load Cache, as in a graph."""

import folder_paths
import torch
from tiny import apply, prompt, random_condition

import omini2_extension.nodes as nodes
from omini2_extension.omini2_core.host import folders

LATENT = {"samples": torch.zeros(1, 16, 12, 12)}


def independent(model, lora, condition=None, **options):
    condition = condition or random_condition()
    return apply(model, condition, lora, attention="independent", **options)


def write(conditioned, folder, positive=None, latent=LATENT, **options) -> str:
    """Omini2 Save Cache; the new file's cache_name."""
    before = set(folder.glob("*")) if folder.exists() else set()
    nodes.SaveCache.execute(conditioned, positive or prompt(0), latent, "kept", **options)
    (path,) = set(folder.glob("*")) - before
    folder_paths.filename_list_cache.pop(folders.FOLDER, None)
    return path.name


def read(model, name, scale=1.0, start=0.0, end=1.0):
    """Omini2 Load Cache."""
    return nodes.LoadCache.execute(model, name, scale, start, end)[0]
