"""Which samplers of a queued prompt will run with what a node of ours gives.

Only those for which that is certain: an extension's node may do anything with a model.
"""

from collections.abc import Iterator

from . import queued
from .queued import Node

# Give on the model that comes in, with all that our nodes have said of it.
SAME_MODEL = {
    "Omini2ApplyLoRA",
    "Omini2ConditionCache",
    "Omini2ImageGuidance",
    "Omini2LoadCache",
    "Omini2SpotEdit",
    "LoraLoader",
    "LoraLoaderModelOnly",
    "ModelSamplingAuraFlow",
    "ModelSamplingFlux",
    "TorchCompileModel",
}
GUIDERS = {"BasicGuider", "CFGGuider"}


def samplers_of(node: Node) -> Iterator[Node]:
    """The samplers that will take steps with the model that a node gives."""
    for each in _behind(node):
        if _takes_steps(each) and _wanted(each):
            yield each


def _behind(node: Node) -> Iterator[Node]:
    """All that the node's model reaches, itself left out."""
    seen, left = {node.number}, [node]
    while left:
        at = left.pop()
        for reader in at.readers("model", "guider"):
            if reader.number in seen:
                continue
            seen.add(reader.number)
            yield reader
            if reader.kind in SAME_MODEL | GUIDERS:
                left.append(reader)


def _takes_steps(node: Node) -> bool:
    """Whether it is a sampler of the host's that doesn't give its latent back as it came."""
    if node.kind == "KSampler":
        return _above_0(node, "steps", "denoise")
    if node.kind == "KSamplerAdvanced":
        return node.constant("start_at_step") == 0 and _above_0(node, "steps", "end_at_step")
    if node.kind not in ("SamplerCustom", "SamplerCustomAdvanced"):
        return False
    sigmas = node.source("sigmas")
    if sigmas is None or sigmas[0].kind != "BasicScheduler":
        return False
    return _above_0(sigmas[0], "steps", "denoise")


def _above_0(node: Node, *names: str) -> bool:
    return all((node.constant(name) or 0) > 0 for name in names)


def _wanted(node: Node) -> bool:
    """Whether an output that was asked for needs it for certain."""
    outputs = queued.targets()
    seen, left = {node.number}, [node]
    while left:
        at = left.pop()
        if _is_output(at) and (outputs is None or at.number in outputs):
            return True
        for reader in at.readers():
            if reader.number not in seen and not _chooses(reader):
                seen.add(reader.number)
                left.append(reader)
    return False


def _is_output(node: Node) -> bool:
    return getattr(node.host_class, "OUTPUT_NODE", False) is True


def _chooses(node: Node) -> bool:
    """Whether it decides in the run which of its inputs it wants."""
    inputs = node.host_class.INPUT_TYPES() if node.host_class else {}
    kinds = [inputs.get(group, {}) for group in ("required", "optional")]
    return any(len(each) > 1 and each[1].get("lazy") for kind in kinds for each in kind.values())
