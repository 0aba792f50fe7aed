"""Draws graphs: an oracle first, then features that it can judge."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

import comfy.samplers

from . import build, files
from .graph import FLUX1, Condition, Edit, Graph, Lora, Merge, Prompt, Reference
from .oracles import ONCE
from .wrappers import FRESH, PLANS

FALLING = "plain", "first half", "second half"
SCHEDULES = (*FALLING, "rising", "back and forth", "small jumps back", "twice the same")
# How references may be placed, where a model has a choice that it doesn't fail at.
METHODS = {FLUX1: ("index", "offset", "uxo/uno"), "FLUX.2 klein": ("index", "offset", "uxo/uno")}
CONDITIONS_OR_NOT = {"reuse", "refreshed", "segments", "rows", "pictures", "by_hand", "again"}
GUIDERS = "cfg", "cfg", "basic", "dual", "perpneg"
# How often each is drawn.
WEIGHTS = {"reuse": 6, "segments": 2, "rows": 5, "pictures": 3, "by_hand": 4, "dual_model": 1,
           "lora": 4, "merge": 3, "integration": 4, "off": 2, "effect": 2, "again": 2, "order": 2,
           "saved": 2, "same": 2, "mask": 1, "refreshed": 3, "edit": 4, "edit_rows": 3,
           "edit_known": 3, "edit_off": 1}  # fmt: skip
# Those that can judge references; on models without conditions; only what changes nothing.
REFERRING = {"reuse", "refreshed", "segments", "rows", "pictures", "by_hand", "integration", "off",
             "effect", "again", "order", "saved", "same", "dual_model", "merge"}  # fmt: skip
EDITING = {"reuse", "refreshed", "segments", "rows", "pictures", "by_hand", "off", "again", "same"}
EXACT = {"reuse", "rows", "pictures", "by_hand", "saved", "same", "dual_model", "merge"}


def drawn(seed: int, number: int) -> tuple[str, Graph]:
    """Graph number N of a seed, the same wherever the host is; its oracle and itself."""
    rng = Random(f"{seed}/{number}")
    offered = {k: w for k, w in WEIGHTS.items() if k != "dual_model" or build.HAS_DUAL_MODEL}
    name = rng.choices([*offered], [*offered.values()])[0]
    graph = globals().get(f"_{name}", _any)(rng)
    if name == "refreshed" or (name in REFERRING and rng.random() < 0.4):
        graph = _referring(rng, name, graph)
    return name, graph


def _reference(rng: Random, graph: Graph) -> Reference:
    whole = rng.random() < 0.2
    return Reference(
        rows=graph.rows if whole else rng.randint(1, 4),
        columns=graph.columns if whole else rng.randint(1, 4),
        images=rng.choice((1, 1, graph.batch)),
        seed=rng.randrange(100),
    )


def _referring(rng: Random, name: str, graph: Graph) -> Graph:
    """With references, most often the same for all prompts, and maybe on another model."""
    shared = tuple(_reference(rng, graph) for _ in range(rng.choice((1, 1, 2, 3))))
    kind = rng.choice((FLUX1, *files.MODELS)) if name in EDITING else FLUX1
    method = rng.choice(("", "", *METHODS.get(kind, ())))

    def referring(prompt: Prompt) -> Prompt:
        own = tuple(_reference(rng, graph) for _ in range(rng.randint(0, 3)))
        return replace(prompt, references=_maybe(rng, 0.7, shared, own), method=method)

    graph = replace(
        graph,
        positive=tuple(map(referring, graph.positive)),
        negative=tuple(map(referring, graph.negative)),
        references=rng.choice(("joint", "isolated")),
        storage=graph.storage if kind == FLUX1 or name != "again" else "model",
    )
    if kind != FLUX1:
        graph = _on(rng, kind, graph)
    elif name in CONDITIONS_OR_NOT and rng.random() < 0.5:
        graph = replace(graph, conditions=(), image_guidance=1.0)
    if name in ("off", "effect"):  # beside references as the model has them
        as_they_are = rng.choice(({"references": "off"}, {"references": "joint", "reuse": "off"}))
        graph = replace(graph, **as_they_are)
    if graph.joint and name in EXACT:
        sampler = graph.sampler if graph.sampler in ONCE else "euler"
        graph = replace(_exact(rng, graph), sampler=sampler)
    return graph


def _layer(kind: str) -> str:
    return files.ELSEWHERE.get(kind, "double_blocks.0.img_attn.qkv")


def _on(rng: Random, kind: str, graph: Graph) -> Graph:
    """On another model, without what is for FLUX.1 only."""
    graph = graph.change_prompts(control=0.0)
    if "double_blocks" not in _layer(kind):
        graph = graph.change_prompts(hook=0.0)
    if files.MODELS[kind].video:  # the host cuts no areas out of latents with a time
        graph = graph.change_prompts(area=None, bounds=False, default=False)
    loras = tuple(replace(lora, layer=_layer(kind), kind="lora", loader="model", after=False)
                  for lora in graph.loras)  # fmt: skip
    return replace(graph, model=kind, conditions=(), image_guidance=1.0, merge=None, loras=loras,
                   noise_mask=False, dev=True)  # fmt: skip


def _maybe(rng: Random, share: float, value: Any, otherwise: Any) -> Any:
    return value if rng.random() < share else otherwise


def _condition(rng: Random, graph_rows: int, graph_columns: int, batch: int = 1) -> Condition:
    compressed = rng.random() < 0.15
    placement = rng.choice(("aligned", "aligned", "fit", "right", "left", "above", "custom"))
    easy = rng.random() < 0.2
    fitting = rng.random() < 0.5
    return Condition(
        rows=4 if compressed else graph_rows if fitting else rng.randint(1, 5),
        columns=4 if compressed else graph_columns if fitting else rng.randint(1, 5),
        images=1 if compressed else rng.choice((1, 1, 1, 2, 3)) if batch > 1 else 1,
        seed=rng.randrange(100),
        placement=placement,
        delta=(rng.randint(-4, 4), rng.randint(-4, 4)) if placement == "custom" else (0, 0),
        position_scale=1.0 if placement == "fit" else rng.choice((1.0, 1.0, 2.0, 0.5)),
        keep=1.0 if compressed else rng.choice((1.0, 1.0, 0.5)),
        compression=0.5 if compressed else 1.0,
        lora="easycontrol" if easy else "omini",
        strength=rng.choice((1.0, 1.0, 0.6, -0.4)),
        scale=rng.choice((1.0, 1.0, 0.5, 1.7)),
        attention="independent" if easy else rng.choice(("independent", "joint")),
    )


def _ranged(rng: Random, condition: Condition) -> Condition:
    start, end = rng.choice(((0.0, 1.0),) * 4 + ((0.3, 1.0), (0.0, 0.6), (0.2, 0.8)))
    return replace(condition, start=start, end=end)


def _prompts(rng: Random, first: int, batch: int = 1, rich: bool = True) -> tuple[Prompt, ...]:
    prompts = []
    for i in range(rng.choice((1, 1, 2, 3)) if rich else 1):
        each = Prompt(
            seed=first + 10 * i,
            length=rng.choice((5, 5, 7)),
            batch=rng.choice((1, 1, batch)),
            guidance=rng.choice((3.5, 3.5, 1.0)),
        )
        if rich and rng.random() < 0.35:
            half = rng.choice(((0.5, 1.0, 0.0, 0.0), (1.0, 0.5, 0.0, 0.5), (0.5, 0.5, 0.5, 0.5),
                               (0.6, 0.7, 0.1, 0.3)))  # fmt: skip
            each = replace(each, area=half, percent=rng.random() < 0.5)
        elif rich and rng.random() < 0.25:
            each = replace(each, mask=rng.randrange(9), bounds=rng.random() < 0.3)
        if rich and rng.random() < 0.2:
            each = replace(each, range=rng.choice(((0.0, 0.5), (0.4, 1.0))))
        if rich and rng.random() < 0.2:
            each = replace(each, strength=0.6)
        if rich and each.area is None and rng.random() < 0.15:
            each = replace(each, control=1.0)
        if i and each.area is None and rng.random() < 0.2:
            each = replace(each, default=True)
        prompts.append(each)
    if all(p.range != (0.0, 1.0) or p.area for p in prompts):
        prompts[0] = replace(prompts[0], range=(0.0, 1.0), area=None)  # always something to do
    return tuple(prompts)


def _any(rng: Random, rich: bool = True, conditions: int = 2, batch: int = 3) -> Graph:
    """Of everything something."""
    rows, columns = rng.randint(3, 6), rng.randint(3, 6)
    pictures = rng.choice((1, 1, *range(2, batch + 1)))
    return Graph(
        rows=rows,
        columns=columns,
        batch=pictures,
        seed=rng.randrange(1000),
        steps=rng.randint(2, 3),
        guider=rng.choice(GUIDERS),
        cfg=rng.choice((1.0, 3.0, 3.0)),
        positive=_prompts(rng, 0, pictures, rich),
        negative=_prompts(rng, 1, pictures, rich and rng.random() < 0.3),
        conditions=tuple(
            _ranged(rng, _condition(rng, rows, columns, pictures))
            for _ in range(rng.randint(1, conditions))
        ),
        reuse=rng.choice(("off", "auto", "once", "every_n_steps")),
        keep_on=rng.choice(("auto", "auto", "cpu", "gpu")),
        dev=rng.random() < 0.8,
        image_guidance=rng.choice((1.0, 1.0, 1.0, 1.5)),
        start=rng.choice(("empty", "random", "repeated")),
        noise_mask=rng.random() < 0.1,
    )


def _exact(rng: Random, graph: Graph) -> Graph:
    """With K/V reused only where that changes nothing."""
    reuse = graph.reuse
    if graph.joint and reuse == "once":
        reuse = rng.choice(("auto", "every_n_steps"))
    return replace(graph, reuse=reuse, refresh=1 if graph.joint else rng.randint(1, 5))


def _reuse(rng: Random) -> Graph:
    graph = _any(rng)
    if graph.reuse == "off":
        graph = replace(graph, reuse="auto")
    schedule = rng.choice(SCHEDULES)
    sampler = rng.choice(ONCE if graph.joint else comfy.samplers.SAMPLER_NAMES)
    if schedule not in FALLING:
        sampler = rng.choice(("euler", "euler", "heun", "dpm_2", "euler_ancestral"))
    graph = replace(
        graph,
        schedule=schedule,
        sampler=sampler,
        scheduler=rng.choice(comfy.samplers.SCHEDULER_NAMES),
        steps=rng.randint(2, 4),
        easycache=_maybe(rng, 0.1, 3.0, 0.0),
        split=rng.random() < 0.2,
    )
    if rng.random() < 0.1:
        hooked = tuple(replace(p, hook=0.8) for p in graph.positive)
        graph = replace(graph, positive=hooked)
    if rng.random() < 0.05:
        graph = replace(graph, sampler="lcm upscale", schedule="plain", scheduler="simple",
                        noise_mask=False, steps=3)  # fmt: skip
    return _exact(rng, graph)


def _segments(rng: Random) -> Graph:
    graph = _any(rng, rich=False)
    graph = graph.change_conditions(start=0.0, end=1.0, attention="joint", lora="omini")
    return replace(
        graph,
        # A step that leads nowhere ("twice the same") counts for no step.
        schedule=rng.choice([s for s in SCHEDULES if s != "twice the same"]),
        reuse="every_n_steps",
        refresh=rng.randint(1, 3),
        steps=rng.randint(2, 5),
        image_guidance=1.0,
        noise_mask=False,
        start="random",
    )


def _rows(rng: Random) -> Graph:
    graph = _exact(rng, _any(rng))
    return replace(
        graph,
        wrapper=rng.choice(("", *PLANS, *FRESH)),
        split=rng.random() < 0.2,
        guider=rng.choice(("cfg", "cfg", "dual", "perpneg")),
        cfg=3.0,
        easycache=0.0,
    )


def _pictures(rng: Random) -> Graph:
    graph = _exact(rng, _any(rng))
    batch = rng.randint(2, 4)
    positive = tuple(replace(p, batch=1) for p in graph.positive)
    negative = tuple(replace(p, batch=1) for p in graph.negative)
    conditions = tuple(replace(c, images=rng.randint(1, batch)) for c in graph.conditions)
    return replace(
        graph,
        batch=batch,
        positive=positive,
        negative=negative,
        conditions=conditions if graph.conditions[0].compression == 1 else graph.conditions,
        sampler=rng.choice(ONCE),
        guider=rng.choice(("cfg", "basic", "dual")),  # Perp-Neg looks at the whole batch
        noise_mask=False,
        split=rng.random() < 0.3,
        wrapper=rng.choice(("", "", "prompt by prompt", "row by row", "twice")),
    )


def _by_hand(rng: Random) -> Graph:
    graph = _exact(rng, _any(rng))
    schedule = rng.choice(("plain", "second half", "back and forth", "small jumps back"))
    batch = 1 if graph.guider == "perpneg" else graph.batch
    if graph.guider != "basic":  # to the others the host hands areas and ControlNets on
        positive, negative = (
            tuple(replace(p, area=None, bounds=False, control=0.0) for p in prompts)
            for prompts in (graph.positive, graph.negative)
        )
        graph = replace(graph, positive=positive, negative=negative)
    return replace(graph, schedule=schedule, noise_mask=False, batch=batch)


def _dual_model(rng: Random) -> Graph:
    graph = _exact(rng, _any(rng, rich=False))
    return replace(graph, cfg=3.0, noise_mask=False, start="empty")


# Half of them of the kind that is taken off again.
KINDS = (*["lora"] * len(files.KINDS), *files.KINDS)


def _one_lora(rng: Random, kinds: tuple[str, ...] = KINDS) -> Lora:
    kind = rng.choice(kinds)
    layers = files.PASSED if rng.random() < 0.65 else files.BESIDE
    layer = rng.choice(layers)
    if kind in ("diff", "set_weight") and rng.random() < 0.3:
        layer = files.NORM
    loader = "model"
    if build.LoraLoaderBypassModelOnly is not None and kind in ("lora", "lokr", "loha"):
        loader = _maybe(rng, 0.2, "bypass", "model")
    return Lora(kind, layer, rng.choice((1.0, 0.7, -0.5)), rng.randrange(3), rng.random() < 0.5,
                loader)  # fmt: skip


def _lora(rng: Random) -> Graph:
    condition = replace(
        _condition(rng, 4, 4), attention="independent", scale=1.0, start=0.0, end=1.0
    )
    return Graph(
        conditions=(condition,),
        reuse=rng.choice(("off", "once")),
        guider="basic",
        loras=tuple(_one_lora(rng) for _ in range(rng.choice((1, 1, 2)))),
    )


def _merge(rng: Random) -> Graph:
    plain = ("lora", "lora", "diff", "diff_b")
    graph = _exact(rng, _any(rng, rich=False))
    loras = tuple(
        replace(_one_lora(rng, plain), loader="model") for _ in range(rng.choice((0, 1, 1)))
    )
    inside = _maybe(rng, 0.5, replace(_one_lora(rng, plain), loader="model"), None)
    after = rng.random() < 0.5
    merge = Merge(rng.choice(("simple", "simple", "blocks", "add", "subtract")),
                  rng.choice((0.3, 0.5, 0.9)), inside, after,
                  not after and rng.random() < 0.4)  # fmt: skip
    return replace(graph, merge=merge, loras=loras)


def _integration(rng: Random) -> Graph:
    graph = _any(rng)
    rows, columns = rng.randint(4, 6), rng.randint(4, 6)
    batch = rng.randint(1, 4)
    painted = Condition(
        rows=rows, columns=columns, images=rng.randint(1, batch), seed=rng.randrange(100),
        paint=True, attention=rng.choice(("joint", "independent")),
    )  # fmt: skip
    schedule = rng.choice(SCHEDULES)
    prompts = tuple(replace(p, area=None, bounds=False) for p in graph.positive)
    sampler = comfy.samplers.SAMPLER_NAMES if schedule in FALLING else ("euler", "heun")
    return replace(
        graph, rows=rows, columns=columns, batch=batch, schedule=schedule, noise_mask=False,
        conditions=(painted, *graph.conditions[1:]), positive=prompts,
        negative=tuple(replace(p, area=None, bounds=False) for p in graph.negative),
        sampler=rng.choice(sampler),
        split=rng.random() < 0.3, wrapper=rng.choice(("", "", *PLANS)),
        refresh=rng.randint(1, 3),
    )  # fmt: skip


def _off(rng: Random) -> Graph:
    graph = replace(_any(rng), wrapper=rng.choice(("", "", *PLANS)))
    if rng.random() < 0.5:
        return graph.change_conditions(scale=0.0)
    # The second half of the time never comes in the first half of the schedule.
    return replace(graph.change_conditions(start=0.9, end=1.0), schedule="first half",
                   sampler=rng.choice(ONCE))  # fmt: skip


def _effect(rng: Random) -> Graph:
    graph = _any(rng).change_conditions(start=0.0, end=1.0, scale=1.0)
    return replace(graph, wrapper=rng.choice(("", *PLANS)), schedule=rng.choice(SCHEDULES))


def _again(rng: Random) -> Graph:
    graph = _any(rng)
    loras = tuple(_one_lora(rng) for _ in range(rng.choice((0, 1))))
    hooked = tuple(replace(p, hook=_maybe(rng, 0.3, 0.8, 0.0)) for p in graph.positive)
    merge = _maybe(rng, 0.3, Merge(), None)
    return replace(graph, loras=loras, positive=hooked, merge=merge, refresh=rng.randint(1, 3),
                   easycache=_maybe(rng, 0.2, 3.0, 0.0), storage=rng.choice(("model", "fp8")),
                   sampler=rng.choice(comfy.samplers.SAMPLER_NAMES))  # fmt: skip


def _order(rng: Random) -> Graph:
    graph = _any(rng, rich=False)
    if rng.random() < 0.5:
        return replace(graph, merge=Merge(rng.choice(("simple", "blocks")), 0.4))
    loras = [_one_lora(rng) for _ in range(rng.randint(1, 2))]
    # Together, since some of them set what others add to.
    return replace(graph, loras=tuple(replace(each, after=loras[0].after) for each in loras))


def _saved(rng: Random) -> Graph:
    graph = _any(rng, rich=False, conditions=1)
    condition = replace(_ranged(rng, graph.conditions[0]), images=1,
                        attention=_maybe(rng, 0.9, "independent", "joint"))  # fmt: skip
    loras = (_one_lora(rng),) if rng.random() < 0.3 else ()
    return replace(graph, conditions=(condition,), loras=loras, guider="basic",
                   wrapper=rng.choice(("", "", *PLANS)),
                   positive=(replace(graph.positive[0], batch=1),))  # fmt: skip


def _same(rng: Random) -> Graph:
    return replace(_exact(rng, _any(rng)), noise_mask=False)


def _refreshed(rng: Random) -> Graph:
    graph = replace(_any(rng), sampler=rng.choice(ONCE), schedule=rng.choice(FALLING),
                    steps=rng.randint(2, 4), refresh=rng.randint(1, 3), split=rng.random() < 0.3,
                    image_guidance=1.0,
                    loras=tuple(_one_lora(rng) for _ in range(rng.choice((0, 0, 1)))))  # fmt: skip
    return graph.change_prompts(area=None, bounds=False, default=False, range=(0.0, 1.0))


def _mask(rng: Random) -> Graph:
    paint = rng.random() < 0.4
    return Graph(rows=rng.randint(2, 6), columns=rng.randint(2, 6), steps=rng.randint(1, 8),
                 seed=rng.randrange(1000), conditions=(Condition(paint=paint),))  # fmt: skip


def _edited(rng: Random, rich: bool = True) -> Graph:
    """A graph with references and Spot Edit in the place of conditions."""
    graph = _any(rng, rich=rich)
    by_mask = rng.random() < 0.3
    edit = Edit(
        select="mask" if by_mask else rng.choice(("latent", "latent", "cosine")),
        full=rng.randint(1, 2),
        resets=rng.choice(("none", "auto", "3")),
        fusion="off" if by_mask else rng.choice(("off", "off", "once", "recursive")),
        grow=rng.choice((0, 0, 1)),
        references=rng.choice((1, 1, 2)),
        both=rng.random() < 0.7,
        mask=rng.randrange(9) if by_mask or rng.random() < 0.2 else None,
    )
    threshold = (
        rng.choice((0.0, 0.1)) if edit.select == "cosine" else rng.choice((8.0, 20.0, 100.0))
    )
    return replace(
        graph,
        conditions=(),
        edit=replace(edit, threshold=threshold),
        steps=rng.randint(3, 5),
        image_guidance=1.0,
        positive=tuple(replace(p, area=None, bounds=False, control=0.0) for p in graph.positive),
        negative=tuple(replace(p, area=None, bounds=False, control=0.0) for p in graph.negative),
    )


def _edit(rng: Random) -> Graph:
    graph = _edited(rng)
    assert graph.edit is not None
    edit = replace(graph.edit, grow=0, fusion="off", select="latent", mask=None,
                   threshold=rng.choice((8.0, 20.0, 100.0)))  # fmt: skip
    whole = tuple(replace(p, range=(0.0, 1.0), batch=1) for p in graph.positive)
    negative = tuple(replace(p, range=(0.0, 1.0), batch=1) for p in graph.negative)
    # Perp-Neg looks at the whole picture, also where the oracle lets the model say what it likes.
    guider = "dual" if graph.guider == "perpneg" else graph.guider
    return replace(graph, edit=edit, positive=whole, negative=negative, sampler=rng.choice(ONCE),
                   guider=guider, reuse=rng.choice(("off", "once")))  # fmt: skip


def _edit_rows(rng: Random) -> Graph:
    graph = replace(_edited(rng), wrapper=rng.choice(("", *PLANS, *FRESH)), cfg=3.0)
    return replace(graph, guider=rng.choice(("cfg", "dual")), split=rng.random() < 0.3)


def _edit_known(rng: Random) -> Graph:
    graph = _edited(rng)
    return replace(graph, sampler=rng.choice(comfy.samplers.SAMPLER_NAMES), noise_mask=False,
                   scheduler=rng.choice(comfy.samplers.SCHEDULER_NAMES),
                   easycache=_maybe(rng, 0.1, 3.0, 0.0),
                   wrapper=rng.choice(("", "", *PLANS)))  # fmt: skip


def _edit_off(rng: Random) -> Graph:
    graph = _edited(rng)
    assert graph.edit is not None
    never = replace(graph.edit, select="latent", threshold=0.0, mask=None)
    return replace(graph, edit=never, wrapper=rng.choice(("", "", *PLANS)),
                   sampler=rng.choice(comfy.samplers.SAMPLER_NAMES))  # fmt: skip
