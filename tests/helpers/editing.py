"""Tiny editing models in the host's own classes, and what they give when computed by hand."""

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from safetensors.torch import load_file, safe_open
from tiny import REFERENCE, flux_config, make_model
from torch import Tensor

import omini2_extension.nodes as nodes

FLUX2 = {
    "image_model": "flux2",
    "in_channels": 128,
    "out_channels": 128,
    "vec_in_dim": None,
    "context_in_dim": 24,
    "hidden_size": 32,
    "mlp_ratio": 3.0,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 3,
    "axes_dim": [4, 4, 4, 4],
    "theta": 2000,
    "patch_size": 1,
    "qkv_bias": False,
    "global_modulation": True,
    "mlp_silu_act": True,
    "ops_bias": False,
    "default_ref_method": "index",
    "ref_index_scale": 10.0,
}
QWEN = {
    "image_model": "qwen_image",
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}
KREA2 = {"image_model": "krea2"}
KREA2_SHAPE = {
    "features": 64,
    "tdim": 16,
    "txtdim": 24,
    "heads": 4,
    "kvheads": 2,
    "layers": 3,
    "txtlayers": 3,
    "txtheads": 2,
    "txtkvheads": 2,
}
MAGE = {
    "image_model": "mage_flow",
    "in_channels": 128,
    "out_channels": 128,
    "num_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
}


@dataclass(frozen=True)
class Tiny:
    """A tiny editing model.

    Attributes:
        channels, side: of its latents, and the latent pixels along a token's side.
        video: whether its latents have a dimension of time.
        blocks: how many it has.
        options: what a prompt says beside the references.
    """

    make: Callable[[], ModelPatcher]
    channels: int
    side: int
    video: bool = False
    width: int = 24
    options: dict[str, Any] = field(default_factory=dict)

    def latent(self, h: int, w: int, seed: int, batch: int = 1) -> Tensor:
        """A random latent of h x w tokens, as VAE Encode would give it."""
        generator = torch.Generator().manual_seed(seed)
        size = (1, h * self.side, w * self.side) if self.video else (h * self.side, w * self.side)
        return torch.randn(batch, self.channels, *size, generator=generator)

    def prompt(
        self, seed: int = 0, *refs: Tensor, length: int = 5, batch: int = 1, **options: Any
    ) -> list[Any]:
        """A prompt with references."""
        generator = torch.Generator().manual_seed(1000 + seed)
        said = {"pooled_output": torch.randn(batch, 16, generator=generator), "guidance": 3.5}
        if refs:
            said["reference_latents"] = list(refs)
        text = torch.randn(batch, length, self.width, generator=generator)
        return [[text, {**said, **self.options, **options}]]


def built(kind: str, config: dict[str, Any], weights: dict[str, Tensor] | None = None) -> Any:
    """A ModelPatcher around one of the host's own models, with these weights or random ones."""
    model_config = getattr(comfy.supported_models, kind)(config)
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model(weights or {}, "")
    inner = model.diffusion_model
    if weights is None:
        generator = torch.Generator().manual_seed(0)
        weights = {
            key: torch.randn(value.shape, generator=generator) * (value.shape[-1] ** -0.5)
            for key, value in inner.state_dict().items()
            if value.numel()
        }
    missing, unexpected = inner.load_state_dict(weights, strict=False)
    assert not unexpected and not [k for k in missing if "timestep_zero" not in k], missing
    device = comfy.model_management.get_torch_device()
    return ModelPatcher(model, load_device=device, offload_device=torch.device("cpu"))


def flux2(guidance: bool = False, weights: dict[str, Tensor] | None = None) -> ModelPatcher:
    """FLUX.2 klein's shape, or dev's with a guidance embedder."""
    config = flux_config(guidance, **FLUX2)
    if "txt_ids_dims" in config:
        config["txt_ids_dims"] = [3]
    return built("Flux2", config, weights)


def has(kind: str) -> bool:
    """Whether this host knows a model."""
    return hasattr(comfy.supported_models, kind)


MODELS = {
    "Kontext": Tiny(lambda: make_model(flux_config(True)), 16, 2),
    "FLUX.2 klein": Tiny(flux2, 128, 1),
    "FLUX.2 dev": Tiny(lambda: flux2(True), 128, 1),
    "Qwen": Tiny(lambda: built("QwenImage", QWEN), 16, 2, video=True),
}
if has("Krea2"):
    at_zero = {"reference_latents_method": "index_timestep_zero"}
    MODELS |= {
        "Qwen 2511": Tiny(
            lambda: built("QwenImage", {**QWEN, "default_ref_method": "index_timestep_zero"}),
            16,
            2,
            video=True,
        ),
        "LongCat": Tiny(
            lambda: built(
                "LongCatImage",
                {**flux_config(False), "vec_in_dim": None, "txt_ids_dims": [1, 2]},
            ),
            16,
            2,
        ),
        "Mage-Flow": Tiny(lambda: built("MageFlow", MAGE), 128, 1),
        "Krea 2": Tiny(
            lambda: built("Krea2", {**KREA2, **KREA2_SHAPE}), 16, 2, True, 72, options=at_zero
        ),
    }


# Their rows in docs/compatibility.md.
ROWS = {
    "Kontext": ("FLUX.1 Kontext", ""),
    "FLUX.2 klein": ("FLUX.2 klein", "klein-9b-kv: references isolated."),
    "FLUX.2 dev": ("FLUX.2 dev", ""),
    "Qwen": ("Qwen-Image-Edit, 2509", ""),
    "Qwen 2511": ("Qwen-Image-Edit-2511", "ComfyUI knows how it was trained since 0.5."),
    "LongCat": ("LongCat", ""),
    "Mage-Flow": ("Mage-Flow", ""),
    "Krea 2": ("Krea 2", "Through Edit Model Reference Method; without it Krea 2 sees none."),
}


def row(name: str, verdict: str = "works", note: str = "") -> pytest.MarkDecorator:
    """A test answers this row about references."""
    return pytest.mark.compatibility("Editing models", name, verdict, note)


def models_with_rows() -> list[Any]:
    """All of them, for tests that say whether references work."""
    return [pytest.param(name, marks=row(ROWS[name][0], note=ROWS[name][1])) for name in MODELS]


def of_class(name: str) -> Any:
    """A model that goes by one of the host's names."""
    model = MODELS["Kontext"].make()
    model.model.__class__ = type(name, (type(model.model),), {})
    return model


def cached(model: ModelPatcher, reuse: str = "auto", every: int = 5, **options: Any) -> Any:
    """Condition Cache."""
    given = {"storage": "model", "keep_on": "auto", "references": "joint", **options}
    return nodes.ConditionCache.execute(model, reuse, every, **given)[0]


def sample(
    model: ModelPatcher,
    tiny: Tiny,
    positive: list[Any],
    negative: list[Any] | None = None,
    *,
    h: int = 4,
    w: int = 6,
    steps: int = 4,
    cfg: float = 1.0,
    batch: int = 1,
    sampler: str = "euler",
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """The stock KSampler's path on an empty picture of h x w tokens."""
    latent = torch.zeros_like(tiny.latent(h, w, 0, batch))
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, "simple", positive, negative or positive, latent,
        disable_pbar=True, seed=seed, **options,
    )  # fmt: skip


def counting(model: ModelPatcher) -> list[int]:
    """A list of how many references each call of the model's own forward is given."""
    calls: list[int] = []
    inner = model.model.diffusion_model
    own = inner._forward

    @functools.wraps(own)
    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(
            len(inspect.signature(own).bind(*args, **kwargs).arguments["ref_latents"] or ())
        )
        return own(*args, **kwargs)

    inner._forward = forward
    return calls


def one_prompt_at_a_time() -> Any:
    """The host has no room for two prompts in one batch."""

    def free(device: object = None, torch_free_too: bool = False) -> object:
        return (1 << 34, 1 << 34) if torch_free_too else 0

    return mock.patch.object(comfy.model_management, "get_free_memory", free)


class Oracle:
    """The host's whole forward, with the references' K/V replaced by hand in every attention.

    Nothing of the extension is in it: references are in the sequence at every step.
    """

    def __init__(
        self,
        model: ModelPatcher,
        refresh: Callable[[int], bool] | None,
        bias: Sequence[float] = (),
        hidden: Callable[[int], Sequence[bool]] | None = None,
    ) -> None:
        """Args:
        refresh: tells the steps at which references are computed; None isolates them, at time 0.
        bias: of each row of the references, added to the logits of text and picture towards it.
        hidden: tells the rows of the references that nothing looks at, at a step.
        """
        self.bias, self.hidden = torch.tensor(bias), hidden
        self.model = model.clone()
        self.refresh = refresh
        self.kept: dict[Any, tuple[Tensor, Tensor]] = {}
        self.rows = 0
        self.mode = "plain"
        self.model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "oracle", self.forward)
        options = self.model.model_options["transformer_options"]
        # A function, since clones of the MODEL would copy a method's object.
        options["optimized_attention_override"] = lambda *a, **k: self.attention(*a, **k)

    def forward(self, executor: Any, *args: Any, **kwargs: Any) -> Tensor:
        bound = inspect.signature(executor.original).bind(*args, **kwargs)
        given = bound.arguments
        self.rows = 0
        if not given.get("ref_latents"):
            return executor(*args, **kwargs)
        inner = executor.class_obj
        side = getattr(inner, "patch_size", None) or inner.patch
        self.rows = sum(
            -(-t.shape[-2] // side) * -(-t.shape[-1] // side) for t in given["ref_latents"]
        )
        options = given["transformer_options"]
        self.names = options["uuids"]
        schedule = options["sample_sigmas"]
        step = int((schedule > options["sigmas"][0] * 1.00001).sum())
        self.unseen = torch.zeros(self.rows, dtype=torch.bool)
        if self.hidden is not None:
            self.unseen = torch.tensor(self.hidden(step))
        self.reads = iter(range(10_000))
        if self.refresh is not None:
            self.mode = "keep" if self.refresh(step) else "replace"
            return executor(*args, **kwargs)
        time = next(name for name in given if name.startswith("timestep"))
        at_zero = inspect.BoundArguments(bound.signature, given.copy())
        at_zero.arguments[time] = 0 * given[time]
        more = dict(given.get("kwargs", {}))
        default = inner.params.default_ref_method if hasattr(inner, "params") else "index"
        method = more.get("ref_latents_method", default)
        more["ref_latents_method"] = "index" if method.endswith("zero") else method
        at_zero.arguments["kwargs"] = more
        # Conditions, if there are any, take no part in that.
        alone = {"patches_replace": {}, "optimized_attention_override": self.attention}
        at_zero.arguments["transformer_options"] = {**options, **alone}
        self.mode = "isolate"
        executor.original(*at_zero.args, **at_zero.kwargs)
        self.reads = iter(range(10_000))
        self.mode = "replace"
        given["kwargs"] = more  # FLUX.1 fails with the other method in the host itself
        return executor(*bound.args, **bound.kwargs)

    def attention(self, function: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kw: Any):
        if self.rows and "block_index" in kw.get("transformer_options", {}):
            number, n = next(self.reads), self.rows
            batch = len(k) // len(self.names)
            k, v = k.clone(), v.clone()
            for i, given in enumerate(self.names):
                # A negative prompt's copy of an area has the positive one's name.
                name = given, self.names[:i].count(given)
                rows = slice(i * batch, (i + 1) * batch)
                if self.mode == "replace":
                    k[rows, :, -n:], v[rows, :, -n:] = self.kept[name, number]
                else:
                    own = k[rows, :, -n:].clone(), v[rows, :, -n:].clone()
                    self.kept[name, number] = own
            if self.mode == "isolate" or self.unseen.any() or len(self.bias):
                heads, given = rest[0], rest[1] if len(rest) > 1 else kw.get("mask")
                mask = torch.zeros(1, 1, q.shape[2], k.shape[2])
                if self.mode == "isolate":
                    mask[:, :, -n:, :-n] = float("-inf")
                if len(self.bias):
                    mask[:, :, :-n, -n:] += self.bias
                mask[..., -n:].masked_fill_(self.unseen, float("-inf"))
                kw = {**kw, "mask": mask if given is None else mask + given}
                rest = (heads,)
        return function(q, k, v, *rest, **kw)


def outermost(oracle: Oracle) -> Any:
    """The oracle's attention around whatever a run installs, its forward inside of it."""
    del oracle.model.model_options["transformer_options"]["optimized_attention_override"]

    def late(executor: Any, *args: Any, **kwargs: Any) -> Any:
        extra_args = (
            inspect.signature(executor.original).bind(*args, **kwargs).arguments["extra_args"]
        )
        options = extra_args["model_options"]["transformer_options"]
        inner = options["optimized_attention_override"]

        def attention(function: Any, *a: Any, **k: Any) -> Any:
            return oracle.attention(partial(inner, function), *a, **k)

        options["optimized_attention_override"] = attention
        wrappers = options["wrappers"][WrappersMP.DIFFUSION_MODEL]
        wrappers["oracle"] = wrappers.pop("oracle")  # behind ours
        return executor(*args, **kwargs)

    oracle.model.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "oracle", late)
    return oracle.model


class EditingReference:
    """A reference file of an editing model."""

    def __init__(self, name: str) -> None:
        path = REFERENCE / f"{name}.safetensors"
        self.name = name
        self.tensors = load_file(path)
        with safe_open(path, "pt") as file:
            import json

            self.meta = json.loads(file.metadata()["meta"])

    def under(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names begin with a prefix, without it."""
        return {k.removeprefix(prefix): v for k, v in self.tensors.items() if k.startswith(prefix)}

    def model(self) -> ModelPatcher:
        """A fresh model with the file's weights."""
        base = self.under("base.")
        if self.name == "krea2":
            return built("Krea2", {**KREA2, **self.meta["config"]}, base)
        guided = self.meta["config"]["guidance_embeds"]
        return flux2(guided, flux2_weights(base, flux2(guided)))

    def lora(self) -> dict[str, Tensor]:
        """The LoRA of the file, with its keys."""
        return self.under("lora.")


def flux2_weights(base: dict[str, Tensor], like: ModelPatcher) -> dict[str, Tensor]:
    """diffusers' names of FLUX.2 -> ComfyUI's."""
    norm = "weight" if any(k.endswith("query_norm.weight") for k in _names(like)) else "scale"
    out: dict[str, Tensor] = {}
    for key, value in base.items():
        if not key.startswith(("transformer_blocks", "single_transformer_blocks")):
            continue
        blocks, i, rest = key.split(".", 2)
        if blocks == "single_transformer_blocks":
            at = f"single_blocks.{i}"
            out[f"{at}.{SINGLE[rest].replace('*', norm)}"] = value
        elif rest in DOUBLE:
            out[f"double_blocks.{i}.{DOUBLE[rest].replace('*', norm)}"] = value
        for stream, parts in QKV.items():
            if rest == f"attn.{parts[0]}.weight":
                at = key.removesuffix(rest) + "attn."
                fused = torch.cat([base[f"{at}{part}.weight"] for part in parts])
                out[f"double_blocks.{i}.{stream}_attn.qkv.weight"] = fused
    for theirs, ours in TOP.items():
        if theirs in base:
            out[ours] = base[theirs]
    scale, shift = base["norm_out.linear.weight"].chunk(2)
    out["final_layer.adaLN_modulation.1.weight"] = torch.cat((shift, scale))
    return out


def _names(model: ModelPatcher) -> list[str]:
    return list(model.model.diffusion_model.state_dict())


QKV = {"img": ("to_q", "to_k", "to_v"), "txt": ("add_q_proj", "add_k_proj", "add_v_proj")}
SINGLE = {
    "attn.to_qkv_mlp_proj.weight": "linear1.weight",
    "attn.to_out.weight": "linear2.weight",
    "attn.norm_q.weight": "norm.query_norm.*",
    "attn.norm_k.weight": "norm.key_norm.*",
}
DOUBLE = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.*",
    "attn.norm_k.weight": "img_attn.norm.key_norm.*",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.*",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.*",
    "attn.to_out.0.weight": "img_attn.proj.weight",
    "attn.to_add_out.weight": "txt_attn.proj.weight",
    "ff.linear_in.weight": "img_mlp.0.weight",
    "ff.linear_out.weight": "img_mlp.2.weight",
    "ff_context.linear_in.weight": "txt_mlp.0.weight",
    "ff_context.linear_out.weight": "txt_mlp.2.weight",
}
_TIME = "time_guidance_embed.timestep_embedder"
_GUIDANCE = "time_guidance_embed.guidance_embedder"
TOP = {
    "x_embedder.weight": "img_in.weight",
    "context_embedder.weight": "txt_in.weight",
    f"{_TIME}.linear_1.weight": "time_in.in_layer.weight",
    f"{_TIME}.linear_2.weight": "time_in.out_layer.weight",
    f"{_GUIDANCE}.linear_1.weight": "guidance_in.in_layer.weight",
    f"{_GUIDANCE}.linear_2.weight": "guidance_in.out_layer.weight",
    "double_stream_modulation_img.linear.weight": "double_stream_modulation_img.lin.weight",
    "double_stream_modulation_txt.linear.weight": "double_stream_modulation_txt.lin.weight",
    "single_stream_modulation.linear.weight": "single_stream_modulation.lin.weight",
    "proj_out.weight": "final_layer.linear.weight",
}
