"""The nodes' contract: workflows that people share depend on it."""

from pathlib import Path

import pytest

import omini2_extension
from omini2_extension.nodes import NODES

CONTRACT = {
    "Omini2ConditionEncode": (
        ["image", "vae", "placement", "delta_rows", "delta_cols", "position_scale", "mask",
         "resize", "size"],
        ["OMINI2_CONDITION"],
    ),
    "Omini2CompactTokens": (
        ["condition", "compression", "position_correcting", "prune", "threshold", "grow",
         "token_integration", "mask"],
        ["OMINI2_CONDITION", "IMAGE", "INT"],
    ),
    "Omini2ApplyLoRA": (
        ["model", "condition", "lora_name", "strength", "condition_scale", "attention",
         "start_percent", "end_percent"],
        ["MODEL"],
    ),
    "Omini2ConditionCache": (
        ["model", "reuse", "refresh_every", "storage", "keep_on"],
        ["MODEL"],
    ),
    "Omini2ImageGuidance": (["model", "image_guidance_scale"], ["MODEL"]),
    "Omini2SaveCache": (
        ["model", "positive", "latent_image", "filename_prefix", "description"],
        [],
    ),
    "Omini2LoadCache": (
        ["model", "cache_name", "condition_scale", "start_percent", "end_percent"],
        ["MODEL", "STRING"],
    ),
    "Omini2DemoModel": ([], ["MODEL", "CLIP", "VAE"]),
}  # fmt: skip
SCHEMAS = {node.define_schema().node_id: node for node in NODES}


@pytest.mark.parametrize("node_id", CONTRACT)
def test_ids_inputs_and_outputs(node_id) -> None:
    info = SCHEMAS[node_id].GET_NODE_INFO_V1()
    groups = info["input_order"].items()
    order = [name for kind, names in groups if kind != "hidden" for name in names]
    inputs, outputs = CONTRACT[node_id]
    assert order[: len(inputs)] == inputs
    assert set(order[len(inputs) :]) <= set(info["input"].get("optional", {}))
    assert info["output"][: len(outputs)] == outputs


@pytest.mark.parametrize("node_id", SCHEMAS)
def test_everything_is_explained(node_id) -> None:
    schema = SCHEMAS[node_id].define_schema()
    assert schema.description
    for each in [*(schema.inputs or []), *schema.outputs]:
        assert each.tooltip, each
    assert (Path(omini2_extension.__file__).parent / "web" / "docs" / f"{node_id}.md").is_file()


def test_the_host_finds_the_entry_point_and_nothing_else() -> None:
    assert callable(omini2_extension.comfy_entrypoint)
    assert not hasattr(omini2_extension, "NODE_CLASS_MAPPINGS")
    assert (Path(omini2_extension.__file__).parent / omini2_extension.WEB_DIRECTORY).is_dir()
