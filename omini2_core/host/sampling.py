"""One sampling run: what is made when it starts, and gone when it ends, however it ends."""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.model_patcher
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.samplers import CFGGuider
from torch import Tensor

from ..cache.policy import CachePolicy
from ..cache.run_cache import RunCache
from ..engine.references import References
from ..engine.run import Run
from ..errors import Omini2Error, warn
from .advice import advise
from .figures import node_figures
from .hooks import Hooks, size_in_tokens
from .identity import between_runs
from .integration import Integration, WholePicture
from .model import flux1, require_flux1, require_own_parts
from .out_of_memory import said
from .patches import acts_twice, judge, warn_of, weights_identity
from .reference_hooks import ReferenceHooks
from .reference_layout import warn_about_sizes
from .reference_settings import LATENTS, all_references
from .references import require_alone, require_served
from .report import cache_progress, report
from .setup import KEY, Setup
from .sources import branch_sources, saved_sources
from .spot_run import spot_hooks


def outer_sample(
    executor: Any, *args: Any, make_hooks: Callable[..., Hooks] = Hooks, **kwargs: Any
) -> Any:
    """Around the host's ``outer_sample``: a run with conditions, kept references or both."""
    bound = inspect.signature(executor.original).bind(*args, **kwargs)
    given = Given(executor.class_obj, bound.arguments)
    if given.setup.spot is not None:
        return _spot_edit(executor, given, args, kwargs)
    conditions = _condition_hooks(given, make_hooks) if given.has_conditions else None
    hooks: list[Hooks | ReferenceHooks] = [] if conditions is None else [conditions]
    if given.acts_on_references:
        hooks.append(_reference_hooks(given, conditions.run if conditions else None))
    with _reported(hooks, given), said(*hooks), _installed(given.guider, hooks):
        return given.picture.finished(executor(*args, **kwargs), given.schedule)


def _spot_edit(
    executor: Any, given: "Given", args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """A run in which Spot Edit has the references and part of the picture."""
    _require_one_device(given.model)
    hooks = spot_hooks(given.model, given.setup, given.schedule, given.noise, given.prompts)
    with _reported([hooks], given), said(hooks), _installed(given.guider, [hooks]):
        latent: Tensor = executor(*args, **kwargs)
        return latent if given.schedule[-1] else hooks.finished(latent)


class Given:
    """What the host hands over to a run, and what our nodes have said of it."""

    def __init__(self, guider: Any, arguments: Mapping[str, Any]) -> None:
        """Args:
        arguments: of the host's ``outer_sample``.
        """
        self.guider = guider
        self.model: ModelPatcher = guider.model_patcher
        self.setup: Setup = guider.model_options["transformer_options"][KEY]
        self.noise: Tensor = arguments["noise"]
        self.schedule = [float(sigma) for sigma in arguments["sigmas"]]
        self.picture = _picture(self.model, self.setup, self.noise)
        self.prompts = _prompts(guider)
        self.references = all_references(self.prompts)
        warn_about_sizes(self.references, self.model, self.noise)
        advise(guider, self.setup, self.prompts, self.schedule)
        # Some samplers evaluate more prompts than are expected.
        conds = [cond for prompts in guider.conds.values() for cond in prompts]
        self.has_references = any(cond.get(LATENTS) for cond in conds)
        self.acts_by_itself = any(each.act for each in all_references(conds))

    @property
    def policy(self) -> CachePolicy:
        """How K/V are kept."""
        return self.setup.policy or CachePolicy()

    @property
    def has_conditions(self) -> bool:
        """Whether conditions take part; says it where there is nothing to do at all."""
        setup = self.setup
        waiting = setup.policy is not None or setup.image_guidance_scale != 1.0
        if waiting and not setup.branches and not setup.saved and not self.has_references:
            warn(
                "model: no condition is applied to it and no prompt has reference latents; add an "
                "Apply Omini2 LoRA or a ReferenceLatent node."
            )
        active = bool(setup.active_branches or setup.active_saved)
        return active or isinstance(self.picture, Integration)

    @property
    def keeps_references(self) -> bool:
        """Whether references' K/V are used again."""
        how = self.setup.references
        as_they_are = how == "joint" and self.policy.interval(joint=True) == 0
        return how != "off" and not as_they_are

    @property
    def acts_on_references(self) -> bool:
        """Whether references differ from what the model does with them anyway."""
        return self.acts_by_itself or (self.has_references and self.keeps_references)


def _condition_hooks(given: Given, make_hooks: Callable[..., Hooks]) -> Hooks:
    """The hooks of a run with conditions.

    Raises:
        Omini2Error: they can't take part in it.
    """
    model, setup = given.model, given.setup
    require_usable(model)
    _require_one_model(given.guider, setup)
    patched = judge(model)
    if any(not branch.lora.family.keeps_ordinary for branch in setup.active_branches):
        warn_of(patched.stays)
    for branch in setup.branches:
        if branch.lora.family.on_picture and acts_twice(model, branch.lora.deltas):
            warn(
                f"lora_name: {branch.lora.name} is loaded with Load LoRA as well, so it acts on "
                "the picture twice; take Load LoRA out, Apply Omini2 LoRA puts it there."
            )
    left = None if patched.identity is None else between_runs(model)
    run = Run(
        flux1(model),
        [
            *branch_sources(model, setup.active_branches, patched.taken_off, given.noise.shape),
            *saved_sources(model, setup.active_saved),
        ],
        RunCache(given.policy, left, patched.identity),
    )
    run.progress = cache_progress(setup.policy_node)
    canvas = size_in_tokens(model.model.diffusion_model, given.noise)
    return make_hooks(
        run, flux1(model), setup, given.picture, given.schedule, canvas, len(given.prompts)
    )


def _reference_hooks(given: Given, conditions: Run | None) -> ReferenceHooks:
    """The hooks of a run for references.

    Args:
        conditions: the run of the conditions beside them, whose cache they share.

    Raises:
        Omini2Error: a model, or something patched onto it, with which they can't be kept.
    """
    model, setup = given.model, given.setup
    _require_one_device(model)
    family = require_served(model)
    if given.keeps_references:
        require_alone(model)
    else:
        require_alone(model, "model", "use Reference Latent in place of Omini2 Reference")
    identity = weights_identity(model)
    left = None if identity is None else between_runs(model)
    own = RunCache(given.policy, left, identity)
    inner = model.model.diffusion_model
    heads, _ = family.kv(inner)
    references = References(
        own if conditions is None else conditions.cache,
        len(family.numbers(inner)),
        heads,
        setup.references == "isolated",
        given.keeps_references,
    )
    references.progress = cache_progress(setup.policy_node)
    return ReferenceHooks(
        references,
        family,
        model,
        given.schedule,
        given.noise,
        given.references,
        given.acts_by_itself,
        setup,
        conditions,
    )


def require_usable(model: ModelPatcher) -> None:
    """Refuses a model that conditions can't take part in.

    Raises:
        Omini2Error: which model that is, and the way out.
    """
    require_flux1(model)
    require_own_parts(model)
    _require_one_device(model)


def _require_one_device(model: ModelPatcher) -> None:
    if model.get_additional_models_with_key("multigpu"):
        raise Omini2Error(
            "model: MultiGPU CFG Split runs prompts on several devices at once, and conditions and "
            "kept references are computed on one; take that node out of the graph."
        )


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
def _installed(guider: Any, hooks: Sequence[Hooks | ReferenceHooks]) -> Iterator[None]:
    """With the hooks, if any, in the run's own copy of the model's options."""
    given = guider.model_options
    options = comfy.model_patcher.create_model_options_clone(given)
    own = options["transformer_options"]
    own.get("wrappers", {}).get(WrappersMP.PREPARE_SAMPLING, {}).pop(KEY, None)
    for each in hooks:
        each.install(own)
    guider.model_options = options
    try:
        yield
    finally:
        guider.model_options = given


@contextmanager
def _reported(hooks: Sequence[Hooks | ReferenceHooks], given: Given) -> Iterator[None]:
    """Closes the run when it ends, and says what it did."""
    started = time.perf_counter()
    try:
        yield
    finally:
        for each in reversed(hooks):
            each.close()
        if hooks:
            first, steps = hooks[0], len(given.schedule) - 1
            on_cpu = comfy.model_management.is_device_cpu(given.model.load_device)
            nodes = node_figures(first.shown, first.stats, steps, first.canvas, on_cpu)
            report(first, steps, time.perf_counter() - started, nodes)


def _prompts(guider: Any) -> list[dict[str, Any]]:
    """The prompts that the sampler is expected to evaluate, positive and negative."""
    conds = guider.conds
    stock = type(guider).predict_noise is CFGGuider.predict_noise
    if stock and guider.cfg == 1.0 and "positive" in conds:
        return list(conds["positive"])  # the host leaves the negative out
    return [cond for prompts in conds.values() for cond in prompts]
