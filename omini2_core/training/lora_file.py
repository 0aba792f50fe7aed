"""LoRAs on the base while training, and the files that they become.

Keys are the published ones, ``transformer.<module>.lora_A.weight`` and ``.lora_B.weight``, with an
``.alpha`` beside them where alpha isn't the rank: those files carry none and are meant at scale 1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import save
from torch import Tensor, nn

from ..errors import Omini2Error
from ..files import write_atomically
from ..lora.family import OMINICONTROL, PICTURE_FAMILY
from ..lora.file import read_safetensors
from .config import TrainConfig

# The published files' modules, and the ones that the original's configs offer for fewer parameters.
TARGETS = {
    "full": (
        ("norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.2"),
        ("norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"),
        ("x_embedder",),
    ),
    "small": (
        ("norm1.linear", "attn.to_q", "attn.to_k"),
        ("norm.linear", "attn.to_q", "attn.to_k"),
        (),
    ),
    # All linear layers of the blocks, text's too, for what is trained to edit with references.
    "references": (
        (
            "norm1.linear", "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
            "ff.net.0.proj", "ff.net.2",
            "norm1_context.linear", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
            "attn.to_add_out", "ff_context.net.0.proj", "ff_context.net.2",
        ),
        ("norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"),
        ("x_embedder",),
    ),
}  # fmt: skip


def targets(config: TrainConfig) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """The modules that get a LoRA: of double blocks, of single blocks, and others."""
    return TARGETS[config.target_modules if config.references == "off" else "references"]


def target_pattern(config: TrainConfig) -> str:
    """A regular expression for the full names of the modules that get a LoRA."""
    double, single, others = (
        "|".join(name.replace(".", r"\.") for name in names) for names in targets(config)
    )
    parts = [
        rf"transformer_blocks\.\d+\.({double})",
        rf"single_transformer_blocks\.\d+\.({single})",
    ]
    return "|".join([*parts, others] if others else parts)


def adapter_name(index: int) -> str:
    """The LoRA of a condition, by the condition's index."""
    return f"condition_{index}"


def adapters(config: TrainConfig) -> list[str]:
    """The LoRAs of a run: one for each condition, or one for all references."""
    count = len(config.conditions) if config.references == "off" else 1
    return [adapter_name(index) for index in range(count)]


def main_adapter(config: TrainConfig) -> str | None:
    """The LoRA that acts on the picture too."""
    if config.references != "off":
        return adapter_name(0)
    return next((adapter_name(i) for i, c in enumerate(config.conditions) if c.main_lora), None)


def add_loras(flux: nn.Module, config: TrainConfig) -> None:
    """Puts the run's fresh LoRAs on the base: A Gaussian, B zero, in float32.

    Raises:
        Omini2Error: an ``init_lora`` doesn't fit.
    """
    for index, name in enumerate(adapters(config)):
        condition = config.conditions[index]
        lora = LoraConfig(
            r=config.rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            target_modules=target_pattern(config),
        )
        inject_adapter_in_model(lora, flux, name)
        generator = torch.Generator().manual_seed(config.seed + index)
        for _, a, b in lora_layers(flux, name):
            # Original `init_lora_weights: gaussian`; drawn here so that a seed says it all.
            values = torch.randn(a.weight.shape, generator=generator) / config.rank
            a.weight = nn.Parameter(values.to(a.weight.device))
            b.weight = nn.Parameter(torch.zeros(b.weight.shape, device=b.weight.device))
        if condition.init_lora is not None:
            load_into(flux, name, condition.init_lora, config)


def lora_layers(model: nn.Module, adapter: str) -> Iterator[tuple[str, Any, Any]]:
    """Diffusers' name, A and B of each layer with this LoRA; block wrappers are seen through."""
    for name, module in model.named_modules():
        layers = getattr(module, "lora_A", None)
        if layers is not None and adapter in layers:
            plain = ".".join(p for p in name.split(".") if p not in ("flux", "block", "module"))
            plain = plain.replace("_fsdp_wrapped_module.", "")
            yield plain, module.lora_A[adapter], module.lora_B[adapter]


def lora_tensors(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """A LoRA's tensors on the CPU under the published keys, as they are trained."""
    tensors = {}
    for name, a, b in lora_layers(model, adapter):
        for part, layer in (("lora_A", a), ("lora_B", b)):
            weight = layer.weight.detach()
            # Under FSDP each process holds a part.
            weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
            tensors[f"transformer.{name}.{part}.weight"] = weight.cpu().clone().contiguous()
    return tensors


def set_lora(model: nn.Module, adapter: str, tensors: dict[str, Tensor]) -> None:
    """Sets a LoRA's weights exactly as :func:`lora_tensors` gave them."""
    with torch.no_grad():
        for name, a, b in lora_layers(model, adapter):
            a.weight.copy_(tensors[f"transformer.{name}.lora_A.weight"])
            b.weight.copy_(tensors[f"transformer.{name}.lora_B.weight"])


def with_alpha(tensors: dict[str, Tensor], rank: int, alpha: float) -> dict[str, Tensor]:
    """The same with an ``.alpha`` for each module, if the scale isn't 1."""
    if alpha == rank:
        return tensors
    modules = {key.rsplit(".lora_", 1)[0] for key in tensors}
    return {**tensors, **{f"{module}.alpha": torch.tensor(alpha) for module in sorted(modules)}}


def load_into(model: nn.Module, adapter: str, path: Path, config: TrainConfig) -> None:
    """Sets a LoRA's weights from a file of the published format.

    Raises:
        Omini2Error: modules or shapes differ.
    """
    tensors, _ = read_safetensors(path)
    rank, alpha = config.rank, config.lora_alpha
    scale = 1.0
    alphas = {float(v) for k, v in tensors.items() if k.endswith(".alpha")}
    # The file means B(A x) times its own scale, this run times alpha / rank.
    scale = (alphas.pop() / rank if alphas else 1.0) * rank / alpha
    weights = {k: v for k, v in tensors.items() if not k.endswith(".alpha")}
    expected = lora_tensors(model, adapter)
    wrong = sorted(set(weights) ^ set(expected)) or sorted(
        k for k, v in expected.items() if v.shape != weights[k].shape
    )
    if wrong:
        raise Omini2Error(
            f"init_lora: {path.name} doesn't fit this run ({len(wrong)} tensors differ, first "
            f"{wrong[0]}); use the rank, target_modules and base that it was trained with."
        )
    for name, a, b in lora_layers(model, adapter):
        for part, layer, factor in (("lora_A", a, 1.0), ("lora_B", b, scale)):
            value = weights[f"transformer.{name}.{part}.weight"].float() * factor
            with torch.no_grad():
                layer.weight.copy_(value)


def metadata(config: TrainConfig, index: int, summary: dict[str, Any]) -> dict[str, str]:
    """What a file says about how it was trained; the nodes read the keys before the summary."""
    # Trained at several sizes, it is described by the largest.
    sizes = sorted(config.condition_sizes(index), reverse=True)
    target, size = config.target_size, sizes[0]
    described = {
        **(
            _of_condition(config, index, size)
            if config.references == "off"
            else {"references": config.references}
        ),
        "condition_size": f"{size[0]}x{size[1]}",
        "target_size": f"{target[0]}x{target[1]}",
        "base_model": Path(config.base).name,
        "rank": config.rank,
        "alpha": f"{config.lora_alpha:g}",
        "target_modules": config.target_modules,
        "seed": config.seed,
        **summary,
    }
    return {"format": "pt", **{f"omini2.{key}": str(value) for key, value in described.items()}}


def _of_condition(config: TrainConfig, index: int, size: tuple[int, int]) -> dict[str, str]:
    """How a condition of this size, width and height in pixels, is used."""
    condition = config.conditions[index]
    scale = config.placement(index, size).scale
    widths = sorted((width for width, _ in config.condition_sizes(index)), reverse=True)
    pruning = f"empty {condition.threshold:g} {condition.grow}" if condition.pruning else "off"
    return {
        "family": (PICTURE_FAMILY if condition.main_lora else OMINICONTROL).name,
        "independent_condition": str(condition.independent_condition).lower(),
        "condition_type": condition.label,
        "position_delta": _numbers(condition.position_delta),
        "position_scale": _numbers(scale if scale[0] != scale[1] else scale[:1]),
        "compression": ",".join(f"{width / config.target_size[0]:g}" for width in widths),
        "pruning": pruning,
        "integration": str(condition.integration).lower(),
    }


def _numbers(values: tuple[float, ...]) -> str:
    return ",".join(f"{value:g}" for value in values)


def save_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    """Writes a safetensors file into the run's output, as a whole or not at all."""
    data = save({k: v.contiguous() for k, v in tensors.items()}, about)
    write_atomically(path, data, "output")
