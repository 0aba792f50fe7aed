"""What a graph is, as plain values: every field's default is its simplest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

FLUX1 = "Kontext"  # which is FLUX.1's class


@dataclass(frozen=True)
class Condition:
    """An image with its nodes.

    Attributes:
        rows, columns: its size in tokens.
        keep: share of the tokens that a mask keeps.
        paint: token integration of a box.
        lora: of which family.
    """

    rows: int = 4
    columns: int = 4
    images: int = 1
    seed: int = 0
    placement: str = "aligned"
    delta: tuple[int, int] = (0, 0)
    position_scale: float = 1.0
    keep: float = 1.0
    compression: float = 1.0
    paint: bool = False
    lora: str = "omini"
    strength: float = 1.0
    scale: float = 1.0
    attention: str = "independent"
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True)
class Reference:
    """A reference image, of rows x columns tokens; ``images`` are one a picture."""

    rows: int = 4
    columns: int = 4
    images: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Prompt:
    """One entry of a conditioning.

    Attributes:
        batch: prompts in the entry, one a picture.
        area: height, width, top and left as shares of the picture; None for the whole.
        percent: whether the area is given in percent, not in pixels.
        mask: seed of a mask; ``bounds`` has it evaluated on the mask's box only.
        control, hook: strengths of a ControlNet and of a LoRA hook.
        default: whether it is only for what the other prompts leave of the picture.
        method: how the model places references, if not in its own way.
    """

    seed: int = 0
    length: int = 5
    batch: int = 1
    guidance: float = 3.5
    area: tuple[float, float, float, float] | None = None
    percent: bool = False
    mask: int | None = None
    bounds: bool = False
    strength: float = 1.0
    range: tuple[float, float] = (0.0, 1.0)
    control: float = 0.0
    hook: float = 0.0
    default: bool = False
    references: tuple[Reference, ...] = ()
    method: str = ""


@dataclass(frozen=True)
class Lora:
    """An ordinary LoRA of one kind on one layer; ``after`` says whether it comes after ours."""

    kind: str = "lora"
    layer: str = "double_blocks.0.img_attn.qkv"
    strength: float = 1.0
    seed: int = 0
    after: bool = False
    loader: str = "model"


@dataclass(frozen=True)
class Merge:
    """A second model merged into the first.

    Attributes:
        ratio: of the first model.
        lora: on the second model.
        swapped: whether the second model is the node's first input.
    """

    node: str = "simple"
    ratio: float = 0.5
    lora: Lora | None = None
    after: bool = False
    swapped: bool = False


@dataclass(frozen=True)
class Graph:
    """Everything about one graph but what it is compared with.

    Attributes:
        rows, columns: the picture's size in tokens.
        schedule: what is done to the scheduler's noise levels.
        start: the latent that sampling starts from.
        wrapper: what a unet function wrapper does to a batch's rows.
        split: whether memory is so short that prompts are evaluated one by one.
        easycache: reuse threshold of EasyCache.
        model: which of the tests' tiny editing models; FLUX.1 with or without guidance by ``dev``.
        references: what Condition Cache does with them.
    """

    rows: int = 4
    columns: int = 4
    batch: int = 1
    seed: int = 0
    steps: int = 2
    sampler: str = "euler"
    scheduler: str = "simple"
    schedule: str = "plain"
    guider: str = "ksampler"
    cfg: float = 1.0
    positive: tuple[Prompt, ...] = (Prompt(0),)
    negative: tuple[Prompt, ...] = (Prompt(1),)
    conditions: tuple[Condition, ...] = (Condition(),)
    reuse: str = "off"
    refresh: int = 1
    storage: str = "model"
    keep_on: str = "auto"
    dev: bool = True
    image_guidance: float = 1.0
    loras: tuple[Lora, ...] = ()
    merge: Merge | None = None
    wrapper: str = ""
    split: bool = False
    easycache: float = 0.0
    noise_mask: bool = False
    start: str = "empty"
    model: str = FLUX1
    references: str = "off"

    @property
    def prompts(self) -> tuple[Prompt, ...]:
        """Positive and negative ones."""
        return (*self.positive, *self.negative)

    @property
    def joint(self) -> bool:
        """Whether something is reused that changes from step to step."""
        refs = self.references == "joint" and any(p.references for p in self.prompts)
        return refs or any(c.attention == "joint" for c in self.conditions)

    def change_prompts(self, **changes: Any) -> Graph:
        """With every prompt changed."""
        return replace(
            self,
            positive=tuple(replace(p, **changes) for p in self.positive),
            negative=tuple(replace(p, **changes) for p in self.negative),
        )

    @property
    def integrated(self) -> bool:
        """Whether a condition is a token integration."""
        return any(c.paint for c in self.conditions)

    def change_conditions(self, **changes: Any) -> Graph:
        """With every condition changed."""
        return replace(self, conditions=tuple(replace(c, **changes) for c in self.conditions))


def described(thing: Any) -> str:
    """As a Python expression, without what is default."""
    if isinstance(thing, tuple):
        return f"({''.join(described(each) + ', ' for each in thing)})"
    if not is_dataclass(thing):
        return repr(thing)
    changed = [(f.name, getattr(thing, f.name)) for f in fields(thing)]
    defaults = {f.name: f.default for f in fields(thing)}
    inside = ", ".join(f"{n}={described(v)}" for n, v in changed if v != defaults[n])
    return f"{type(thing).__name__}({inside})"


def simpler(thing: Any) -> Iterator[Any]:
    """The same with one field less than it was, or one field default."""
    for field in fields(thing):
        value = getattr(thing, field.name)
        if field.default is MISSING or value == field.default:
            continue
        yield replace(thing, **{field.name: field.default})
        if isinstance(value, tuple) and any(map(is_dataclass, value)):
            for i, each in enumerate(value):
                if len(value) > 1:
                    yield replace(thing, **{field.name: value[:i] + value[i + 1 :]})
                for other in simpler(each):
                    yield replace(thing, **{field.name: (*value[:i], other, *value[i + 1 :])})
        elif is_dataclass(value):
            for other in simpler(value):
                yield replace(thing, **{field.name: other})
