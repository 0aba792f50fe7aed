"""A graph's nodes, executed: its MODEL, its conditionings and what samples."""

from __future__ import annotations

import itertools
from typing import Any

import comfy.model_management
import comfy.samplers
import comfy_extras.nodes_advanced_samplers as advanced
import comfy_extras.nodes_custom_sampler as custom
import comfy_extras.nodes_hooks as hooks
import comfy_extras.nodes_model_merging as merging
import comfy_extras.nodes_perpneg as perpneg
import nodes as host_nodes
import tiny
import torch
from comfy_extras.nodes_easycache import EasyCacheNode
from comfy_extras.nodes_edit_model import ReferenceLatent
from comfy_extras.nodes_flux import FluxKontextMultiReferenceLatentMethod
from comfy_extras.nodes_model_merging_model_specific import ModelMergeFlux1
from torch import Tensor

import omini2_extension.nodes as nodes

from . import files
from .graph import Condition, Graph, Lora, Merge, Prompt
from .wrappers import named_wrapper

HAS_DUAL_MODEL = hasattr(custom, "DualModelGuider")
try:
    from comfy_extras.nodes_lora_debug import LoraLoaderBypassModelOnly
except ImportError:  # not in 0.3.75
    LoraLoaderBypassModelOnly = None


def made(node: Any, *args: Any, **kwargs: Any) -> Any:
    """The first output of a node of the host, old or new."""
    if hasattr(node, "execute"):
        return node.execute(*args, **kwargs)[0]
    return getattr(node(), node.FUNCTION)(*args, **kwargs)[0]


def box(rows: int, columns: int) -> Tensor:
    """The tokens that a token integration paints."""
    paint = torch.zeros(rows, columns, dtype=torch.bool)
    paint[rows // 4 : rows - 1, columns // 4 : columns - 1] = True
    return paint


def latent(condition: Condition) -> Tensor:
    """(images, 16, 2h, 2w): a condition's image, in the model's space."""
    draw = torch.Generator().manual_seed(100 + condition.seed)
    shape = condition.images, 16, 2 * condition.rows, 2 * condition.columns
    return torch.randn(shape, generator=draw)


def encoded(condition: Condition, image: int | None = None) -> Any:
    """Condition Encode and Compact Tokens; of one of the images alone, if told so."""
    given = latent(condition)
    given = given if image is None else given[image % len(given)][None]
    keep = None
    if condition.keep < 1:
        draw = torch.Generator().manual_seed(condition.seed)
        keep = torch.rand(condition.rows, condition.columns, generator=draw) < condition.keep
        keep[0, 0] = True
    made = tiny.encode(given, condition.placement, condition.delta, condition.position_scale, keep)
    if condition.compression != 1.0:
        made = tiny.compact(made, compression=condition.compression)[0]
    if condition.paint:
        mask = tiny.pixel_mask(box(condition.rows, condition.columns))
        made = tiny.compact(made, token_integration=True, mask=mask, shift_schedule=False)[0]
    return made


def with_conditions(model: Any, graph: Graph, picture: int | None = None) -> Any:
    """Our nodes; ``picture`` alone gets its own image of each condition."""
    for condition in graph.conditions:
        model = tiny.apply(
            model,
            encoded(condition, picture),
            files.condition_lora(condition.lora),
            strength=condition.strength,
            condition_scale=condition.scale,
            attention=condition.attention,
            start_percent=condition.start,
            end_percent=condition.end,
        )
    if (graph.conditions and graph.reuse != "off") or graph.references != "off":
        how = graph.reuse, graph.refresh, graph.storage, graph.keep_on, graph.references
        model = nodes.ConditionCache.execute(model, *how)[0]
    return guided(model, graph) if graph.conditions else model


def guided(model: Any, graph: Graph) -> Any:
    """Image Guidance, unless it is off."""
    if graph.image_guidance == 1.0:
        return model
    return nodes.ImageGuidance.execute(model, graph.image_guidance)[0]


def with_lora(model: Any, lora: Lora) -> Any:
    """The host's loader."""
    if lora.loader == "bypass":
        return made(LoraLoaderBypassModelOnly, model, files.lora_file(lora), lora.strength)
    return made(host_nodes.LoraLoaderModelOnly, model, files.lora_file(lora), lora.strength)


def merged(model: Any, merge: Merge, dev: bool) -> Any:
    """The host's node for merging, with a second model."""
    other = files.model(dev, second=True)
    if merge.lora is not None:
        other = with_lora(other, merge.lora)
    pair, ratio = (model, other), merge.ratio
    if merge.swapped:
        pair, ratio = (other, model), 1 - merge.ratio
    if merge.node == "add":
        return made(merging.ModelAdd, *pair)
    if merge.node == "subtract":
        return made(merging.ModelSubtract, *pair, ratio)
    if merge.node == "blocks":
        return made(ModelMergeFlux1, *pair, **block_ratios(ratio))
    return made(merging.ModelMergeSimple, *pair, ratio)


def block_ratios(ratio: float) -> dict[str, float]:
    """ModelMergeFlux1's inputs, as far as they concern a small model; the first is for the rest."""
    return {"img_in.": ratio, "double_blocks.0.": 1.0, "single_blocks.1.": 1 - ratio,
            "final_layer.": ratio, "txt_in.": 0.0, "double_blocks.1.": ratio}  # fmt: skip


def model_of(graph: Graph, base: Any, picture: int | None = None) -> Any:
    """A graph's MODEL, out of the one that is loaded."""
    model = base
    for lora in graph.loras:
        if not lora.after:
            model = with_lora(model, lora)
    if graph.merge is not None and not graph.merge.after:
        model = merged(model, graph.merge, graph.dev)
    model = with_conditions(model, graph, picture)
    if graph.merge is not None and graph.merge.after:
        model = merged(model, graph.merge, graph.dev)
    for lora in graph.loras:
        if lora.after:
            model = with_lora(model, lora)
    if graph.easycache:
        model = made(EasyCacheNode, model, graph.easycache, 0.15, 0.95, False)
    if graph.wrapper:
        model = model.clone()
        model.set_model_unet_function_wrapper(named_wrapper(graph.wrapper))
    return model


def conditioning(
    prompts: tuple[Prompt, ...], graph: Graph, picture: int | None = None
) -> list[Any]:
    """The prompts' nodes, combined; ``picture`` alone gets its own image of each reference."""
    combined: list[Any] = []
    for each in prompts:
        one = _prompt(each, graph, picture)
        if each.default and combined:
            combined = made(hooks.ConditioningSetDefaultAndCombine, combined, one)
        else:
            combined = made(host_nodes.ConditioningCombine, combined, one) if combined else one
    return combined


def _prompt(prompt: Prompt, graph: Graph, picture: int | None) -> list[Any]:
    options: dict[str, Any] = {"guidance": prompt.guidance}
    if prompt.control:
        hint = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
        control = files.controlnet().copy().set_cond_hint(hint, prompt.control, (0.0, 1.0))
        options |= {"control": control, "control_apply_to_uncond": True}
    kind = files.kind(graph)
    out = kind.prompt(prompt.seed, length=prompt.length, batch=prompt.batch, **options)
    for each in prompt.references:
        image = kind.latent(each.rows, each.columns, 200 + each.seed, each.images)
        image = image if picture is None else image[picture % len(image)][None]
        out = made(ReferenceLatent, out, {"samples": image})
    if prompt.method:
        out = made(FluxKontextMultiReferenceLatentMethod, out, prompt.method)
    if prompt.area is not None:
        height, width, top, left = prompt.area
        sides = width, height, left, top
        if prompt.percent:
            node = host_nodes.ConditioningSetAreaPercentage
        else:
            node = host_nodes.ConditioningSetArea
            token = 8 * kind.side
            across, down = token * graph.columns, token * graph.rows
            sides = tuple(
                int(share * side / token) * token
                for share, side in zip(sides, (across, down, across, down), strict=True)
            )
        out = made(node, out, *sides, prompt.strength)
    if prompt.mask is not None:
        draw = torch.Generator().manual_seed(prompt.mask)
        mask = torch.rand(1, kind.side * graph.rows, kind.side * graph.columns, generator=draw)
        if prompt.bounds:
            mask[:, : kind.side * graph.rows // 2] = 0
        bounds = "mask bounds" if prompt.bounds else "default"
        out = made(host_nodes.ConditioningSetMask, out, mask, bounds, prompt.strength)
    if prompt.range != (0.0, 1.0):
        out = made(host_nodes.ConditioningSetTimestepRange, out, *prompt.range)
    if prompt.hook:
        lora = files.lora_file(Lora(seed=9))
        group = made(hooks.CreateHookLoraModelOnly, lora, prompt.hook)
        out = made(hooks.SetModelHooksOnCond, out, group)
    return out


def sigmas_of(graph: Graph, model: Any) -> Tensor:
    """The noise levels."""
    steps = graph.steps + (graph.schedule in ("first half", "second half"))
    sigmas = comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), graph.scheduler, steps
    ).float()
    if graph.schedule == "rising":
        # At 1 there is only noise left, and a picture can't be told from it.
        return made(custom.FlipSigmas, sigmas).clamp(max=0.999)
    if graph.schedule == "back and forth":
        middle = len(sigmas) // 2
        return torch.cat((sigmas[: middle + 1], sigmas[max(middle - 1, 0) :]))
    if graph.schedule == "small jumps back":
        between = [s - 0.3 * (s - t) for s, t in itertools.pairwise(sigmas)]
        mixed = [m for s, b in zip(sigmas[1:], between, strict=False) for m in (s, b)]
        return torch.stack([sigmas[0], *mixed[:-1]])
    if graph.schedule == "twice the same":
        return sigmas.repeat_interleave(2)[:-1]
    if graph.schedule in ("first half", "second half"):
        high, low = custom.SplitSigmas.execute(sigmas, max(steps // 2, 1)).args
        return high if graph.schedule == "first half" else low
    return sigmas


def sampler_of(graph: Graph) -> Any:
    """The SAMPLER."""
    if graph.sampler == "lcm upscale":
        return made(advanced.SamplerLCMUpscale, 1.5, -1, "bilinear")
    return comfy.samplers.sampler_object(graph.sampler)


def guider_of(graph: Graph, model: Any, picture: int | None = None) -> Any:
    """What combines the prompts."""
    positive = conditioning(graph.positive, graph, picture)
    if graph.guider == "basic":
        return made(custom.BasicGuider, model, positive)
    negative = conditioning(graph.negative, graph, picture)
    if graph.guider == "dual":
        third = conditioning((Prompt(2),), graph)
        return made(
            custom.DualCFGGuider, model, positive, third, negative, graph.cfg, 2.0, "regular"
        )
    if graph.guider == "perpneg":
        third = conditioning((Prompt(2),), graph)
        return made(perpneg.PerpNegGuider, model, positive, negative, third, graph.cfg, 0.7)
    return made(custom.CFGGuider, model, positive, negative, graph.cfg)


def free_memory(device: object = None, torch_free_too: bool = False) -> object:
    """None, for ``comfy.model_management.get_free_memory``: prompts are evaluated one by one."""
    return (1 << 34, 1 << 34) if torch_free_too else 0
