"""Which of the host's editing models have references whose K/V can be kept: a row each.

All run their references beside the picture, last in the sequence, and place the picture the same
way with and without them. Adding a model is adding a row and running its tests.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ..errors import Omini2Error, require_kind
from .model import model_name, number_bytes, require_flux1

REFERENCES = ("auto", "joint", "isolated", "off")
T0_METHOD = "index_timestep_zero"  # the host's name for references at time 0


@dataclass(frozen=True)
class Family:
    """One of the host's models.

    Attributes:
        name: as people know it.
        base: its class in ``comfy.model_base``.
        module: the class of its diffusion model.
        blocks: for each kind of block, in the order in which the model runs them, the name that
            attention is told and the list that holds them.
        patch: latent pixels along a token's side.
        kv: heads that K/V have of their own, and numbers in one.
        modulated_by: arguments of the forward that isolated references depend on, beside their
            latents; the prompt is never one of the others.
        default_method: how it places references where the prompt doesn't say; None ignores them.
        origin: which point of the picture and of a reference it lays on each other, in words.
    """

    name: str
    base: str
    module: str
    blocks: tuple[tuple[str, str], ...]
    patch: Callable[[Any], int]
    kv: Callable[[Any], tuple[int, int]]
    modulated_by: Callable[[Any], tuple[str, ...]]
    default_method: Callable[[Any], str | None]
    origin: str = "upper left"

    def numbers(self, model: Any) -> dict[tuple[str, int], int]:
        """What attention is told of a block -> its number in the order of running."""
        kinds = [(kind, i) for kind, name in self.blocks for i in range(len(getattr(model, name)))]
        return {each: number for number, each in enumerate(kinds)}

    def tokens(self, model: Any, latents: Sequence[Tensor]) -> int:
        """How many rows references take, whose latents are (n, channels, ..., height, width)."""
        side = self.patch(model)
        return sum(
            math.prod(t.shape[2:-2]) * math.prod(math.ceil(n / side) for n in t.shape[-2:])
            for t in latents
        )

    def method(self, model: Any, arguments: Mapping[str, Any]) -> str | None:
        """How references are placed in a call; None where the model ignores them."""
        given: str | None = arguments.get("kwargs", {}).get("ref_latents_method")
        return given or self.default_method(model)

    def placing_method(self, model: Any, arguments: Mapping[str, Any]) -> str:
        """The method that places references as a call does, but at the picture's own time."""
        method = self.method(model, arguments)
        return "index" if method is None or method == T0_METHOD else method

    def kv_bytes_per_token(self, patcher: ModelPatcher) -> int:
        """Bytes that K and V of one token take over all blocks."""
        model = patcher.model.diffusion_model
        heads, head_dim = self.kv(model)
        return 2 * heads * head_dim * len(self.numbers(model)) * number_bytes(patcher)


def _flux(name: str, base: str, pooled: bool) -> Family:
    def modulated_by(model: Any) -> tuple[str, ...]:
        guided = ("guidance",) if model.params.guidance_embed else ()
        return ("y", *guided) if pooled else guided

    return Family(
        name,
        base,
        "comfy.ldm.flux.model:Flux",
        (("double", "double_blocks"), ("single", "single_blocks")),
        patch=lambda m: m.patch_size,
        kv=lambda m: (m.num_heads, m.hidden_size // m.num_heads),
        modulated_by=modulated_by,
        default_method=lambda m: m.params.default_ref_method,
    )


def _qwen(name: str, base: str, module: str) -> Family:
    return Family(
        name,
        base,
        module,
        (("double", "transformer_blocks"),),
        patch=lambda m: m.patch_size,
        kv=lambda m: (
            m.transformer_blocks[0].attn.heads,
            m.inner_dim // m.transformer_blocks[0].attn.heads,
        ),
        modulated_by=lambda m: ("guidance", "additional_t_cond"),
        default_method=lambda m: getattr(m, "default_ref_method", "index"),
        origin="centre",
    )


FAMILIES = (
    _flux("FLUX.1 Kontext", "Flux", pooled=True),
    _flux("FLUX.2", "Flux2", pooled=False),
    _flux("LongCat", "LongCatImage", pooled=False),
    _qwen("Qwen-Image-Edit", "QwenImage", "comfy.ldm.qwen_image.model:QwenImageTransformer2DModel"),
    _qwen("Mage-Flow", "MageFlow", "comfy.ldm.mage_flow.model:MageFlowTransformer2DModel"),
    Family(
        "Krea 2",
        "Krea2",
        "comfy.ldm.krea2.model:SingleStreamDiT",
        (("single", "blocks"),),
        patch=lambda m: m.patch,
        kv=lambda m: (m.blocks[0].attn.kvheads, m.blocks[0].attn.headdim),
        modulated_by=lambda m: (),
        default_method=lambda m: m.default_ref_method,
    ),
)
MOVED = "its picture lies elsewhere without references, so they can't be left out of any step"
# Classes in ``comfy.model_base`` -> why their references can't be kept.
REFUSED = {
    "Lumina2": MOVED,
    "Omnigen2": MOVED,
    "Boogu": MOVED,
    "JoyImage": "its references lie between picture and text, not behind them",
    "Chroma": "ComfyUI gives it no references",
    "ChromaRadiance": "ComfyUI gives it no references",
}
# Those that keep K/V of their references themselves, as long as nothing is patched onto them.
KEEP_THEIR_OWN = ("HiDreamO1", "QwenImage21")


def family_of(model: ModelPatcher) -> Family | None:
    """A model's row; None if its references aren't served."""
    base = model.model
    kind = type(getattr(base, "diffusion_model", None))
    module = f"{kind.__module__}:{kind.__qualname__}"
    known = (f for f in FAMILIES if (f.base, f.module) == (type(base).__name__, module))
    family = next(known, None)
    if family is None or family.base != "Flux":
        return family
    try:
        require_flux1(model)
    except Omini2Error:  # as Fill, whose references would need channels that they haven't got
        return None
    return family


def require_cacheable(model: ModelPatcher, references: str) -> Family | None:
    """The row of a model that Condition Cache has something to do on.

    Returns:
        None for a model that keeps its references' K/V itself.

    Raises:
        Omini2Error: why not this model, or not with what is patched onto it.
    """
    require_kind("model", model, isinstance(model, ModelPatcher), "model", "Load Diffusion Model")
    base = model.model
    family = family_of(model)
    if family is not None:
        if references != "off":
            require_alone(model)
        return family
    if type(base).__name__ in KEEP_THEIR_OWN:
        return None
    raise _refusal(
        model, "FLUX.1 or an editing model whose references can be kept", "Condition Cache"
    )


def require_served(model: ModelPatcher) -> Family:
    """The row of a model that Omini2 Reference can give references to.

    Raises:
        Omini2Error: why not this model.
    """
    require_kind("model", model, isinstance(model, ModelPatcher), "model", "Load Diffusion Model")
    family = family_of(model)
    if family is not None:
        return family
    if type(model.model).__name__ in KEEP_THEIR_OWN:
        raise Omini2Error(
            f"model: {model_name(model.model)} keeps its references' keys and values itself, and "
            "can't have others than it computes; use VAE Encode and Reference Latent."
        )
    raise _refusal(model, "an editing model whose references can be compact", "Omini2 Reference")


def _refusal(model: ModelPatcher, served: str, node: str) -> Omini2Error:
    """Why a node doesn't serve a model.

    Raises:
        Omini2Error: what of FLUX.1 it isn't.
    """
    if type(model.model).__name__ == "Flux":
        require_flux1(model)
    names = [each.name for each in FAMILIES]
    return Omini2Error(
        f"model: this is {model_name(model.model)}, not {served}{_reason(model.model)}; load "
        f"{', '.join(names[:-1])} or {names[-1]}, or take {node} out of the graph."
    )


def _reason(base: object) -> str:
    names = [kind.__name__ for kind in type(base).__mro__]
    why = next((REFUSED[name] for name in names if name in REFUSED), "")
    if any(name.startswith("WAN") for name in names):
        why = "its references are frames of the video"
    return f" ({why})" if why else ""


def require_alone(
    model: ModelPatcher, name: str = "references", otherwise: str = "set references to off"
) -> None:
    """Refuses a model on which the host's own node keeps references' K/V too.

    Args:
        name: of the input that it is said at.
        otherwise: what else can be done than to take that node out.

    Raises:
        Omini2Error: it does.
    """
    patches = model.model_options["transformer_options"].get("patches", {}).get("attn1_patch", ())
    if any(type(patch).__name__ == "KV_Attn_Input" for patch in patches):
        raise Omini2Error(
            f"{name}: Flux KV Cache keeps the references of this model already, and computes them "
            f"in another way; take that node out of the graph, or {otherwise}."
        )
