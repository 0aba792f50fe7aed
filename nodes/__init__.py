"""The nodes, one file each: schema, tooltips and a few lines into the core."""

from comfy_api.latest import io

from .apply_lora import ApplyLora
from .compact_tokens import CompactTokens
from .condition_cache import ConditionCache
from .condition_encode import ConditionEncode
from .demo_image import DemoImage
from .demo_model import DemoModel
from .image_guidance import ImageGuidance
from .keep_unchanged import KeepUnchanged
from .load_cache import LoadCache
from .reference import Reference
from .save_cache import SaveCache
from .spot_edit import SpotEditNode
from .train_lora import TrainLora

NODES: list[type[io.ComfyNode]] = [
    ConditionEncode,
    CompactTokens,
    ApplyLora,
    ConditionCache,
    ImageGuidance,
    Reference,
    SaveCache,
    LoadCache,
    SpotEditNode,
    KeepUnchanged,
    TrainLora,
    DemoModel,
    DemoImage,
]
