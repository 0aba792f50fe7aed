"""Prompts on areas of a picture and context windows: each part has its own K/V and positions."""

import comfy.sample
import nodes as host_nodes
import pytest
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from tiny import (
    LatentVae,
    apply,
    prompt,
    random_condition,
    recorded_runs,
    relative_error,
    sample,
    with_cache,
)

from omini2_extension.nodes import ConditionEncode
from omini2_extension.omini2_core.engine.branch import BranchSource
from omini2_extension.omini2_core.errors import Omini2Error

areas = pytest.mark.compatibility(
    "Neighbours",
    "area conditioning",
    "works",
    "Aligned and fitted conditions lie on the whole picture; others beside each area.",
)
masks = pytest.mark.compatibility("Neighbours", "regional masks on prompts", "works")
windows = pytest.mark.compatibility(
    "Neighbours", "context windows over rows or columns of the picture", "works"
)


def area(seed: int, width: int, x: int, height: int = 96, y: int = 0):
    """A prompt on a part of the picture, in pixels."""
    return host_nodes.ConditioningSetArea().append(prompt(seed), width, height, x, y, 1.0)[0]


def two_areas():
    return area(0, 48, 0) + area(2, 48, 48)


def masked(seed: int, left: bool):
    mask = torch.zeros(1, 12, 12)
    mask[..., slice(0, 6) if left else slice(6, 12)] = 1
    return host_nodes.ConditioningSetMask().append(prompt(seed), mask, "default", 1.0)[0]


def on_noise(model, noise: torch.Tensor, positive) -> torch.Tensor:
    return comfy.sample.sample(
        model,
        noise,
        3,
        1.0,
        "euler",
        "simple",
        positive,
        prompt(1),
        torch.zeros_like(noise),
        disable_pbar=True,
    )


def condition_for_the_part(placement: str):
    """What lies on the whole picture of 6x6 tokens, as a part from its column 3 on sees it."""
    moved = {"aligned": {"placement": "custom", "delta": (0, -3)}, "right": {"placement": "right"}}
    return random_condition(**moved[placement])


@areas
@pytest.mark.parametrize("attention", ["joint", "independent"])
@pytest.mark.parametrize("placement", ["aligned", "right"])
def test_an_area_sees_the_condition_where_it_lies(model, lora, attention, placement) -> None:
    noise = comfy.sample.prepare_noise(torch.zeros(1, 16, 12, 12), 0)
    condition = random_condition(placement=placement)
    whole = with_cache(apply(model, condition, lora, attention=attention), "every_n_steps", 2)
    part = apply(model, condition_for_the_part(placement), lora, attention=attention)
    part = with_cache(part, "every_n_steps", 2)
    got = on_noise(whole, noise, area(0, 48, 48))[..., 6:]
    want = on_noise(part, noise[..., 6:], prompt(0))
    assert relative_error(got, want) < 1e-5
    assert relative_error(got, on_noise(model, noise, area(0, 48, 48))[..., 6:]) > 1e-3


@areas
@pytest.mark.parametrize("attention", ["joint", "independent"])
def test_areas_and_their_negative_copies_do_not_share(model, lora, attention) -> None:
    """The host gives the negative prompt's copy of an area the positive one's name."""
    conditioned = apply(model, random_condition(), lora, attention=attention)
    want = sample(conditioned, cfg=3.0, positive=two_areas())
    reuse = ("every_n_steps", 1) if attention == "joint" else ("once",)
    got = sample(with_cache(conditioned, *reuse), cfg=3.0, positive=two_areas())
    assert relative_error(got, want) < 1e-5
    assert relative_error(want, sample(model, cfg=3.0, positive=two_areas())) > 1e-3


@areas
def test_a_fitted_condition_is_fitted_to_the_whole_picture(model, lora) -> None:
    fitted = apply(model, random_condition(3, 3, placement="fit"), lora)
    stretched = apply(model, random_condition(3, 3, position_scale=2.0), lora)
    want = sample(stretched, positive=two_areas())
    assert relative_error(sample(fitted, positive=two_areas()), want) < 1e-5


@masks
def test_masked_prompts(model, lora) -> None:
    regions = masked(0, True) + masked(2, False)
    conditioned = apply(model, random_condition(), lora, attention="independent")
    want = sample(conditioned, cfg=2.0, positive=regions)
    with recorded_runs() as runs:
        got = sample(with_cache(conditioned, "once"), cfg=2.0, positive=regions)
        sample(with_cache(conditioned, "once"), cfg=2.0)
    assert relative_error(got, want) < 1e-5
    assert 2 * runs[0].kv_bytes == 3 * runs[1].kv_bytes
    assert relative_error(want, sample(model, cfg=2.0, positive=regions)) > 1e-3


def windowed(model, dim: int, schedule: str = "standard_static", **options):
    values = {"context_stride": 1, "closed_loop": False, "fuse_method": "flat", **options}
    if "freenoise" in ContextWindowsManualNode.execute.__code__.co_varnames:
        values["freenoise"] = False
    return ContextWindowsManualNode.execute(
        model, context_length=8, context_overlap=4, context_schedule=schedule, dim=dim, **values
    )[0]


@windows
@pytest.mark.parametrize("attention", ["joint", "independent"])
@pytest.mark.parametrize("dim", [2, 3])
def test_windows_over_the_picture(model, lora, attention, dim) -> None:
    conditioned = apply(model, random_condition(), lora, attention=attention)
    want = sample(windowed(conditioned, dim))
    reuse = ("every_n_steps", 1) if attention == "joint" else ("once",)
    assert relative_error(sample(windowed(with_cache(conditioned, *reuse), dim)), want) < 1e-5
    assert relative_error(want, sample(windowed(model, dim))) > 1e-3


@windows
def test_a_window_sees_the_condition_where_it_lies(model, lora) -> None:
    """A condition on the last columns is out of reach of a window's own first columns."""
    keep = torch.zeros(6, 6, dtype=torch.bool)
    keep[:, 3] = True
    column = random_condition(keep=keep)
    seen = []
    conditioned = apply(model, column, lora, attention="independent")
    spy = windowed(conditioned, 3)

    def record(self, call, origin=None, positions=BranchSource.positions):
        ids = positions(self, call, origin)
        seen.append(sorted({float(c) for c in ids[:, 2]}))
        return ids

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BranchSource, "positions", record)
        sample(spy, steps=1)
    assert [3.0] in seen and any(at != [3.0] for at in seen)
    # A window of 8 latent columns that starts at 4 has the token of column 3 in its second column;
    # newer hosts start it one latent column earlier.
    assert seen[-1] in ([1.0], [1.5])


@pytest.mark.compatibility(
    "Neighbours", "context windows with a stride over the picture", "refused"
)
def test_windows_that_take_columns_apart_are_refused(model, lora) -> None:
    conditioned = apply(model, random_condition(6, 12), lora)
    looped = windowed(conditioned, 3, "looped_uniform", context_stride=3, closed_loop=True)
    with pytest.raises(Omini2Error, match=r"^model: its context windows .* standard_static\.$"):
        sample(looped, 6, 12)


@pytest.mark.compatibility(
    "Neighbours",
    "context windows over the pictures of a batch",
    "works with a limit",
    "One condition image for all pictures; several are refused.",
)
def test_windows_over_the_batch(model, lora) -> None:
    conditioned = apply(model, random_condition(3, 3), lora, attention="independent")
    # The pinned host compares as many noise levels as there are pictures.
    options = {"h": 3, "w": 3, "batch": 10, "steps": 9}
    want = sample(conditioned, **options)
    got = sample(windowed(with_cache(conditioned, "once"), 0), **options)
    assert relative_error(got, want) < 1e-5
    two = torch.cat([random_condition(seed=s).pixels for s in (0, 1)])
    several = ConditionEncode.execute(two, LatentVae(), "aligned", 0, 0, 1.0)[0]
    with pytest.raises(Omini2Error, match=r"^image: it holds 2 images.* leave the context windows"):
        sample(windowed(apply(model, several, lora), 0), **options)
