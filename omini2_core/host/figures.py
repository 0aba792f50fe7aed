"""What the nodes show after a run: plain data by node id, for the editor to put into words.

Nothing here goes into a computation or a cache key; a node without an id shows nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cache.policy import CachePolicy
from ..engine.run import RunStats
from ..tokens.condition import Condition
from .setup import Branch, Setup

MAP_SIDE = 32  # cells along a map's longer side; it is an inch wide and saved with the workflow
Figures = dict[str, Any]


def node_figures(
    setup: Setup, stats: RunStats, steps: int, picture_hw: tuple[int, int], on_cpu: bool
) -> dict[str, Figures]:
    """Node id -> what that node shows.

    Args:
        picture_hw: the picture's size in tokens.
        on_cpu: whether the model computes on the CPU, so that there is no other place.
    """
    shown: dict[str, Figures] = {}
    for branch in setup.branches:
        if branch.node is not None:
            shown[branch.node] = branch_figures(branch, picture_hw)
    for saved in setup.saved:
        if saved.node is not None:
            shown[saved.node] = {"kind": "saved", "tokens": saved.saved.tokens}
    if stats.spot is not None and setup.spot is not None and setup.spot.node is not None:
        shown[setup.spot.node] = spot_figures(stats, on_cpu)
    if setup.policy is not None and setup.policy_node is not None:
        shown[setup.policy_node] = cache_figures(setup.policy, stats, steps, on_cpu)
    return shown


def branch_figures(branch: Branch, picture_hw: tuple[int, int]) -> Figures:
    """A condition's tokens, and where they lie beside the picture.

    ``box`` is (row, column, height, width) in picture tokens, the picture being
    (0, 0, *picture_hw).
    """
    condition, place = branch.condition, branch.condition.placement
    (h, w), (scale_y, scale_x) = condition.hw, place.scale_for(condition.hw, picture_hw)
    down, right = place.delta_for(condition.hw)
    return {
        "kind": "condition",
        "attention": "joint" if branch.joint else "independent",
        "active": branch.condition_scale > 0 and condition.token_count > 0,
        "picture": list(picture_hw),
        "box": [down * scale_y, right * scale_x, h * scale_y, w * scale_x],
        **_tokens(condition),
    }


def cache_figures(policy: CachePolicy, stats: RunStats, steps: int, on_cpu: bool) -> Figures:
    """How often K/V were computed, what they take, and what reuse spared."""
    return {
        "kind": "cache",
        "reuse": policy.reuse,
        "computed": stats.refreshes,
        "reused": stats.reused,
        "steps": steps,
        "kv_bytes": stats.kv_bytes,
        "storage": stats.storage,
        "place": "cpu" if on_cpu else stats.keep_on,
        "saved": stats.spared,
        **_references(stats),
    }


def spot_figures(stats: RunStats, on_cpu: bool) -> Figures:
    """What was edited, drawn over the picture, and what each call of the model computed of it."""
    spot = stats.spot
    assert spot is not None
    h, w = spot.hw
    figures: Figures = {
        "kind": "spot",
        "tokens": h * w if spot.edited is None else int(spot.edited.sum()),
        "of": h * w,
        "picture": [h, w],
        "box": [0, 0, h, w],
        "shares": [round(share, 3) for share in spot.shares],
        "saved": 1 - spot.share,
        "kv_bytes": stats.kv_bytes,
        "storage": stats.storage,
        "place": "cpu" if on_cpu else stats.keep_on,
    }
    return figures if spot.edited is None else {**figures, "kept": kept_map(spot.edited)}


def _references(stats: RunStats) -> Figures:
    """What was done with references, if anything; ``beside`` is how many conditions there were."""
    kept = stats.references
    if kept is None:
        return {}
    drift = None if kept.drift is None else round(kept.drift, 6)
    return {
        "references": {
            "beside": len(stats.tokens),
            "attention": "isolated" if kept.isolated else "joint",
            "count": kept.count,
            "tokens": kept.tokens,
            "saved": kept.spared,
            "drift": drift,
        }
    }


def compact_figures(before: int, condition: Condition, kv_bytes_per_token: int) -> Figures:
    """What compacting a condition of ``before`` tokens left of it."""
    return {
        "kind": "compact",
        "before": before,
        "kv_bytes": condition.token_count * kv_bytes_per_token,
        "picture": list(condition.hw),
        "box": [0, 0, *condition.hw],
        **_tokens(condition),
    }


def _tokens(condition: Condition) -> Figures:
    h, w = condition.hw
    figures: Figures = {"tokens": condition.token_count, "of": h * w}
    return figures if condition.keep is None else {**figures, "kept": kept_map(condition.keep)}


def kept_map(keep: Tensor) -> list[str]:
    """(h, w) bool -> rows of 0 and 1, coarser where there are more than MAP_SIDE tokens."""
    cells = keep[None].float()
    larger = max(keep.shape) / MAP_SIDE
    if larger > 1:
        cells = F.adaptive_max_pool2d(cells, [max(1, round(n / larger)) for n in keep.shape])
    return ["".join(map(str, row)) for row in cells[0].to(torch.int).tolist()]
