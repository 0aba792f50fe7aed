"""One sampling run: what is made when it starts, and gone when it ends, however it ends."""

import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from torch import Tensor

from ..cache.policy import CachePolicy
from ..cache.run_cache import RunCache
from ..engine.run import Run
from ..errors import Omini2Error, warn
from .figures import node_figures
from .hooks import Hooks, size_in_tokens
from .identity import between_runs
from .integration import Integration, WholePicture
from .model import flux1, require_flux1, require_own_parts
from .patches import judge
from .report import cache_progress, report
from .setup import KEY, Setup
from .sources import branch_sources, saved_sources


def outer_sample(
    executor: Any, *args: Any, make_hooks: Callable[..., Hooks] = Hooks, **kwargs: Any
) -> Any:
    """Around the host's ``outer_sample``: a run with conditions."""
    guider = executor.class_obj
    arguments = inspect.signature(executor.original).bind(*args, **kwargs).arguments
    setup: Setup = guider.model_options["transformer_options"][KEY]
    picture = _picture(guider.model_patcher, setup, arguments["noise"])
    if not _takes_part(setup, picture):
        with _installed(guider, None):
            return executor(*args, **kwargs)

    require_usable(guider.model_patcher)
    _require_one_model(guider, setup)
    run = _start(guider.model_patcher, setup, arguments["noise"])
    schedule = [float(sigma) for sigma in arguments["sigmas"]]
    canvas = size_in_tokens(guider.model_patcher.model.diffusion_model, arguments["noise"])
    model, chunks = flux1(guider.model_patcher), _chunk_count(guider)
    hooks = make_hooks(run, model, setup, picture, schedule, canvas, chunks)
    on_cpu = comfy.model_management.is_device_cpu(guider.model_patcher.load_device)
    with _installed(guider, hooks), _reported(run, hooks.shown, len(schedule) - 1, canvas, on_cpu):
        return picture.finished(executor(*args, **kwargs), schedule)


def require_usable(model: ModelPatcher) -> None:
    """Refuses a model that conditions can't take part in.

    Raises:
        Omini2Error: which model that is, and the way out.
    """
    require_flux1(model)
    require_own_parts(model)
    if model.get_additional_models_with_key("multigpu"):
        raise Omini2Error(
            "model: MultiGPU CFG Split runs prompts on several devices at once, and conditions are "
            "computed on one; take that node out of the graph."
        )


def _takes_part(setup: Setup, picture: WholePicture) -> bool:
    """Whether a run differs from one without this extension."""
    if not setup.branches and not setup.saved:
        warn("model: no condition is applied to it; add an Apply Omini2 LoRA node.")
    return bool(setup.active_branches or setup.active_saved) or isinstance(picture, Integration)


def _picture(model: ModelPatcher, setup: Setup, noise: Tensor) -> WholePicture:
    if setup.integration is None:
        return WholePicture()
    condition = setup.integration.condition
    assert condition.paint is not None
    known = model.model.process_latent_in(condition.latent)
    integration = Integration(condition.paint, condition.latent, known)
    integration.check_size(*noise.shape[-2:])
    # With nothing known there is nothing to take out: plain sampling.
    return WholePicture() if condition.paint.all() else integration


def _start(model: ModelPatcher, setup: Setup, noise: Tensor) -> Run:
    patched = judge(model)
    patched.warn()
    left = None if patched.identity is None else between_runs(model)
    run = Run(
        flux1(model),
        [
            *branch_sources(model, setup.active_branches, patched.taken_off, noise.shape),
            *saved_sources(model, setup.active_saved),
        ],
        RunCache(setup.policy or CachePolicy(), left, patched.identity),
    )
    run.progress = cache_progress(setup.policy_node)
    return run


def _require_one_model(guider: Any, setup: Setup) -> None:
    """Refuses a guider that runs one model under two names, with and without conditions.

    The host gives both the same options, so that nothing tells them apart.
    """
    model = guider.model_patcher
    for other in vars(guider).values():
        if not isinstance(other, ModelPatcher) or other.model is not model.model:
            continue
        if other.model_options["transformer_options"].get(KEY) is not setup:
            raise Omini2Error(
                "model: this guider runs the same model under two names (model_negative), and "
                "conditions can't take part in one of them only; use CFGGuider or KSampler, or "
                "load the model a second time for model_negative."
            )


def refuse_to_prepare(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of the host's ``prepare_sampling`` where no run of ours is around it.

    So a guider that samples with a MODEL beside its own would leave out that one's conditions.
    """
    raise Omini2Error(
        "model: conditions on a MODEL that a guider runs beside its own (model_negative) can't "
        "take part; connect that MODEL as it was before Apply Omini2 LoRA, and apply conditions to "
        "the other."
    )


@contextmanager
def _installed(guider: Any, hooks: Hooks | None) -> Iterator[None]:
    """With the hooks, if any, in the run's own copy of the model's options."""
    given = guider.model_options
    options = comfy.model_patcher.create_model_options_clone(given)
    own = options["transformer_options"]
    own.get("wrappers", {}).get(WrappersMP.PREPARE_SAMPLING, {}).pop(KEY, None)
    if hooks is not None:
        hooks.install(own)
    guider.model_options = options
    try:
        yield
    finally:
        guider.model_options = given


@contextmanager
def _reported(
    run: Run, shown: Setup, steps: int, canvas: tuple[int, int], on_cpu: bool
) -> Iterator[None]:
    """Closes the run when it ends, and says what it did.

    Args:
        shown: whose nodes are told.
    """
    started = time.perf_counter()
    try:
        yield
    finally:
        run.close()
        nodes = node_figures(shown, run.stats, steps, canvas, on_cpu)
        report(run, steps, time.perf_counter() - started, nodes)


def _chunk_count(guider: Any) -> int:
    """How many prompts the sampler will evaluate, positive and negative."""
    conds = guider.conds
    if getattr(guider, "cfg", None) == 1.0 and "positive" in conds:
        return len(conds["positive"])  # the host leaves the negative out
    return sum(map(len, conds.values()))
