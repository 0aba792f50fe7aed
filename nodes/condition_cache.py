"""Condition Cache: K/V of conditions and references are reused between steps."""

from dataclasses import replace

from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..omini2_core.cache.entry import KEEP_ON, STORAGE
from ..omini2_core.cache.policy import REUSE, CachePolicy
from ..omini2_core.errors import require_choice, require_known, warn
from ..omini2_core.host.attach import get_setup, with_setup
from ..omini2_core.host.reference_files import graph_files, says_isolated
from ..omini2_core.host.references import REFERENCES, require_cacheable
from . import common


class ConditionCache(io.ComfyNode):
    """Sets when the keys and values of conditions and references are computed again."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return common.schema(
            node_id="Omini2ConditionCache",
            display_name="Condition Cache",
            category="Omini2",
            description="Keeps the keys and values of conditions and reference images between "
            "steps instead of running them through the model at every step. Without this node "
            "every step runs all of them.",
            search_aliases=[
                "ominicontrol",
                "kv cache",
                "feature reuse",
                "speed up",
                "faster",
                "reference",
                "kontext",
                "edit",
                "klein",
                "qwen",
            ],
            inputs=[
                io.Model.Input(
                    "model", tooltip="A FLUX.1 model with conditions applied, or an editing model."
                ),
                io.Combo.Input(
                    "reuse",
                    options=list(REUSE),
                    default="auto",
                    tooltip="auto: independent conditions once, which changes nothing in the "
                    "picture; joint ones every refresh_every steps. once: compute all at the "
                    "first step only (for joint conditions an approximation, fastest). "
                    "every_n_steps: all every refresh_every steps. off: at every step.",
                ),
                io.Int.Input(
                    "refresh_every",
                    default=5,
                    min=1,
                    max=1000,
                    tooltip="Steps between two computations, for joint conditions with auto and "
                    "for all with every_n_steps. Fewer is closer to no cache, more is faster.",
                ),
                io.Combo.Input(
                    "storage",
                    options=list(STORAGE),
                    default="model",
                    tooltip="The number format that keys and values are kept in. model: that of "
                    "the model's own computation, without loss. fp8: half the memory of 16 bits, "
                    "with a small loss.",
                ),
                io.Combo.Input(
                    "keep_on",
                    options=list(KEEP_ON),
                    default="auto",
                    tooltip="Where keys and values are kept. gpu: where the model computes. cpu: "
                    "in the computer's own memory, each block's brought over while the one before "
                    "it computes. auto: gpu if the whole model and they fit there together, else "
                    "cpu; the log says which.",
                ),
                io.Combo.Input(
                    "references",
                    options=list(REFERENCES),
                    default="auto",
                    optional=True,
                    tooltip="The prompt's reference latents, of FLUX.1 Kontext, FLUX.2, "
                    "Qwen-Image-Edit and others. joint: computed as the model does, every "
                    "refresh_every steps (once and off as reuse says). isolated: they see "
                    "references only, at time 0, and are computed once; for models and LoRAs "
                    "trained so. auto: isolated if the file says so (klein-9b-kv, kv_cache), else "
                    "joint. off: left to the model.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The same model with the cache switched on."
                )
            ],
            wants_id=True,
            wants_graph=True,
        )

    @classmethod
    def execute(
        cls,
        model: ModelPatcher,
        reuse: str,
        refresh_every: int,
        storage: str,
        keep_on: str,
        references: str = "auto",
        **foreign: object,
    ) -> io.NodeOutput:
        require_known(foreign)
        require_choice("references", references, REFERENCES)
        policy = CachePolicy(reuse, refresh_every, storage, keep_on)
        family = require_cacheable(model, references)
        if family is None:
            warn(
                "model: it keeps its references' keys and values itself, so Condition Cache leaves "
                "it alone; take the node out of the graph."
            )
            return io.NodeOutput(model)
        if references == "auto":
            references = "isolated" if says_isolated(model, graph_files(cls)) else "joint"
        setup = replace(
            get_setup(model), policy=policy, policy_node=common.node_id(cls), references=references
        )
        return io.NodeOutput(with_setup(model, setup))
