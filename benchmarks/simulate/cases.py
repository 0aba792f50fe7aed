"""What is run on a pretended card, by name."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch

from benchmarks.simulate.world import RANK, SIDE, Result, World, flux1

CONDITION = 32  # tokens of a condition's side: 512 pixels
EDITED = 1024  # tokens of the picture that Spot Edit has to compute


@dataclass(frozen=True)
class Case:
    """A graph.

    Attributes:
        model: a key of :data:`MODELS`.
        fp8: whether the weights are.
        conditions, attention, scale: of Apply Omini2 LoRA.
        reuse, storage, keep_on: of Condition Cache; None leaves it out.
        extra: nodes beside these: "integration", "guidance", "save", "saved", "spot".
        references: of an editing model.
    """

    model: str = "FLUX.1"
    fp8: bool = False
    conditions: int = 0
    attention: str = "independent"
    scale: float = 1.0
    reuse: str | None = None
    storage: str = "model"
    keep_on: str = "auto"
    extra: str = ""
    references: int = 0
    cfg: float = 1.0
    batch: int = 1
    steps: int = 2

    @property
    def plain(self) -> "Case":
        """The same without anything of ours."""
        same = {"cfg": self.cfg, "batch": self.batch, "references": self.references}
        return Case(self.model, self.fp8, **same)


def independent(n: int, **more: Any) -> Case:
    """Conditions that are computed once."""
    return Case(conditions=n, reuse="once", **more)


def joint(n: int, **more: Any) -> Case:
    """Joint conditions, refreshed every 5 steps."""
    return Case(conditions=n, attention="joint", reuse="every_n_steps", **more)


def editing(model: str, n: int, **more: Any) -> Case:
    """An editing model whose references' K/V are computed once."""
    return Case(model, references=n, reuse="once", **more)


EDITORS = {"Kontext": "FLUX.1", "FLUX.2 dev": "FLUX.2 dev", "Qwen": "Qwen"}
COUNTS = 1, 2, 4  # references
WORK = {
    "plain": Case(),
    "plain, cfg": Case(cfg=3.0),
    **{f"{n} independent": independent(n) for n in (1, 4, 8)},
    **{f"{n} joint": joint(n) for n in (1, 4, 8)},
    "4 joint, every step": Case(conditions=4, attention="joint"),
    "4 independent, K/V in fp8": independent(4, storage="fp8", keep_on="gpu"),
    "4 independent, K/V on the CPU": independent(4, keep_on="cpu"),
    "4 independent, K/V in fp8 on the CPU": independent(4, storage="fp8", keep_on="cpu"),
    "4 independent, scale 0.7": independent(4, scale=0.7),
    "4 independent, cfg": independent(4, cfg=3.0),
    "token integration": Case(reuse="once", extra="integration"),
    "1 independent, image guidance": independent(1, extra="guidance"),
    "1 joint, image guidance": joint(1, extra="guidance"),
    "Save Cache": Case(conditions=1, extra="save", steps=1),
    "Load Cache": Case(extra="saved"),
    **{f"{name}, {n}": editing(model, n) for name, model in EDITORS.items() for n in COUNTS},
    **{
        f"{name}, {n}, plain": Case(model, references=n)
        for name, model in EDITORS.items()
        for n in COUNTS
    },
    "Kontext, Spot Edit": Case(references=1, extra="spot", steps=6),
}
FP8 = ", fp8 weights"
# Those that are told of each card: in fp8 all, in 16 bits the first ones.
ON_CARDS = ("plain", "1 independent", "4 independent", "8 independent", "4 joint")
EDITORS_ON_CARDS = ("Kontext, 1, plain", "Kontext, 1", "Kontext, 4, plain", "Kontext, 4")


def plain_of(name: str) -> str:
    """The name of the case without anything of ours that a case is compared to."""
    return next(other for other, case in WORK.items() if case == WORK[name].plain)


CASES = WORK | {
    f"{name}{FP8}": replace(WORK[name], fp8=True) for name in (*ON_CARDS, *EDITORS_ON_CARDS)
}


def kind_of(model: str, depth: int | None) -> Any:
    """The host's words for a model with so many blocks of its first kind; None for all."""
    from benchmarks import editing as models

    if model == "FLUX.2 dev":
        depth = depth or FULL[model]
        return models.flux2(48, depth, 6 * depth, 15360, guided=True)
    if model == "Qwen":
        return models.qwen(24, depth or FULL[model], 3584)
    return flux1(depth)[0]


FULL = {"FLUX.1": 19, "FLUX.2 dev": 8, "Qwen": 60}  # blocks of the first kind


class Builder:
    """Graphs on one card, of models with so many blocks."""

    def __init__(self, world: World, depth: int | None = None) -> None:
        from benchmarks import flux

        self.world, self.depth, self._flux = world, depth, flux
        self.shape = flux1(depth)[1]
        self.loras = flux.lora_folder(self.shape, RANK)  # to be entered around all of it

    def kind(self, case: Case) -> Any:
        """The case's model."""
        return kind_of(case.model, self.depth)

    def graph(self, case: Case) -> Any:
        """The case's MODEL, as its nodes give it."""
        flux = self._flux
        model = self.world.model(self.kind(case), case.fp8)
        for _ in range(case.conditions):
            model = flux.with_condition(model, CONDITION, case.attention, case.scale)
        add: dict[str, Callable[[Any], Any]] = {
            "integration": self._integrated, "saved": self._saved, "spot": self._spot,
        }  # fmt: skip
        if case.extra in add:
            model = add[case.extra](model)
        if case.reuse is not None:
            model = flux.with_cache(model, case.reuse, 5, case.storage, case.keep_on)
        if case.extra == "guidance":
            model = flux.nodes.ImageGuidance.execute(model, 1.5)[0]
        return model

    def _integrated(self, model: Any) -> Any:
        """A quarter of the picture is to be painted."""
        flux, side = self._flux, 16 * SIDE
        mask = torch.zeros(1, side, side)
        mask[:, : side // 2, : side // 2] = 1
        condition = flux.encoded(torch.rand(1, side, side, 3), "aligned")
        condition = flux.nodes.CompactTokens.execute(
            condition, 1.0, True, "off", 0.0, 0, True, mask
        )[0]
        return flux.applied(model, condition, "independent")

    def _saved(self, model: Any) -> Any:
        """K/V as a file of Omini2 Save Cache holds them, in memory that isn't pinned."""
        from omini2_extension.omini2_core.cache.entry import Entry, KeysValues
        from omini2_extension.omini2_core.cache.file import IMAGE, Saved
        from omini2_extension.omini2_core.host import identity
        from omini2_extension.omini2_core.host.attach import add_saved
        from omini2_extension.omini2_core.host.setup import SavedBranch

        shape, tokens = self.shape, CONDITION**2
        heads, count = shape.hidden // self._flux.HEAD, shape.blocks
        blocks = {
            n: KeysValues(*torch.empty(2, 1, heads, tokens, self._flux.HEAD, dtype=torch.bfloat16))
            for n in range(count)
        }
        with unnamed():
            fit = identity.fit_of(model)
        pooled = torch.ones(1, shape.pooled_width, dtype=torch.bfloat16)
        entries = {IMAGE: Entry(count, blocks, set(blocks))}
        saved = Saved(fit, tokens, None, "", "", pooled, None, entries)
        return add_saved(model, SavedBranch(saved))

    def _spot(self, model: Any) -> Any:
        """By a mask: other choices depend on numbers."""
        mask = (torch.arange(SIDE**2) < EDITED).reshape(SIDE, SIDE)
        mask = mask.repeat_interleave(16, 0).repeat_interleave(16, 1).float()[None]
        node = self._flux.nodes.SpotEditNode
        return node.execute(model, "mask", 0.2, 4, "auto", "off", 0, None, mask)[0]


@contextmanager
def unnamed() -> Iterator[None]:
    """Weights have no numbers to be known by."""
    from omini2_extension.omini2_core.host import identity

    with mock.patch.object(identity, "_weights_name", lambda of: "pretended"):
        yield


def run(world: World, builder: Builder, case: Case, **options: Any) -> Result:
    """Runs a case on an empty card."""
    world.forget()
    kind = builder.kind(case)
    with world.working():
        model = builder.graph(case)

    def sample() -> None:
        world.sample(kind, model, case.references, case.steps, case.cfg, case.batch)

    def save() -> None:
        from omini2_extension.omini2_core.host import saved

        latent = {"samples": torch.zeros(1, 16, 2 * SIDE, 2 * SIDE)}
        with unnamed():
            saved.compute(model, world.prompt(kind, 1.0), latent, "")

    return world.run(model, save if case.extra == "save" else sample, **options)
