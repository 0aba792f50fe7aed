"""What K/V belong to: the model that runs leave them on, the model that a file fits."""

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..cache.between_runs import BetweenRuns
from ..cache.file import Fit
from ..digest import digest
from ..errors import Omini2Error
from ..lora.deltas import digest_of
from .model import flux1, require_flux1
from .patches import judge

SAMPLES = 64  # numbers of each weight that a model is recognised by


def between_runs(model: ModelPatcher) -> BetweenRuns:
    """What runs of this model leave for the next: on the model itself, so that it goes with it."""
    base = model.model
    if not hasattr(base, "omini2_between_runs"):
        base.omini2_between_runs = BetweenRuns()
    left: BetweenRuns = base.omini2_between_runs
    return left


def fit_of(model: ModelPatcher) -> Fit:
    """What K/V have to agree with to be used with a model.

    Ordinary LoRAs don't count: most families take them off for the conditions.

    Raises:
        Omini2Error: what is patched onto the model has no name that a file could tell.
    """
    require_flux1(model)
    if not judge(model).tellable:
        raise untellable()
    flux = flux1(model)
    dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    return Fit(_weights_name(model), len(flux.blocks), flux.heads, flux.head_dim, str(dtype))


def with_ordinary(model: ModelPatcher, fit: Fit) -> str:
    """Names a model's weights with the ordinary LoRAs on them, for K/V that these count in."""
    return f"{fit.model}+{digest_of(judge(model).taken_off)}"


def untellable() -> Omini2Error:
    """What is patched onto the model has no name that a file could tell."""
    return Omini2Error(
        "model: its weights are merged or patched in a way that no file can describe; save the "
        "model with Save Checkpoint first and load that."
    )


def _weights_name(model: ModelPatcher) -> str:
    """A few numbers of every weight, as it is without patches: another model has others.

    The parameters themselves: a quantised model's state dict can hold more than it has.
    """
    parts: list[Tensor | str] = []
    for name, parameter in sorted(model.model.diffusion_model.named_parameters()):
        key = f"diffusion_model.{name}"
        backup = model.backup.get(key)
        flat = (parameter if backup is None else backup.weight).detach().flatten()
        parts += [key, flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]]
    return digest(parts)
