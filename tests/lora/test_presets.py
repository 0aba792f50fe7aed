"""What a LoRA's file name or its metadata fills in, and what is said of other files."""

import asyncio
import json
import logging
from dataclasses import fields

import folder_paths
import pytest
import torch
from aiohttp.test_utils import make_mocked_request
from safetensors.torch import save_file
from tiny import (
    LatentVae,
    apply,
    compact,
    flux_config,
    make_model,
    random_condition,
    random_lora,
)

from dev.docs import lora_table
from dev.paths import ROOT
from omini2_extension.nodes import NODES, ConditionEncode
from omini2_extension.omini2_core.host import routes
from omini2_extension.omini2_core.host.setup import ATTENTION
from omini2_extension.omini2_core.lora import presets, usage
from omini2_extension.omini2_core.lora.family import EASYCONTROL, OMINICONTROL, PLACEMENT_CHOICES
from omini2_extension.omini2_core.lora.recognise import answer as answer_of
from omini2_extension.omini2_core.tokens.resize import RESIZE

OMINI_KEYS = [f"transformer.x_embedder.lora_{part}.weight" for part in "AB"]
EASY_KEYS = [
    f"single_transformer_blocks.0.attn.processor.q_loras.0.{part}.weight" for part in ("down", "up")
]
TRAINED = {
    "omini2.independent_condition": "true",
    "omini2.condition_type": "edges",
    "omini2.position_delta": "0,0",
    "omini2.position_scale": "2",
    "omini2.condition_size": "256x256",
    "omini2.target_size": "512x512",
    "omini2.compression": "0.5",
    "omini2.integration": "false",
    "omini2.base_model": "flux1-schnell.safetensors",
}


def ask(**query: str) -> tuple[int, dict]:
    """The route's answer."""
    text = "&".join(f"{key}={value}" for key, value in query.items())
    response = asyncio.run(routes.preset(make_mocked_request("GET", f"/omini2/preset?{text}")))
    return response.status, json.loads(response.body)


# --- the table ---------------------------------------------------------------------------------


def test_every_value_is_one_that_the_nodes_take() -> None:
    schemas = [node.define_schema() for node in NODES]
    inputs = {i.id: i for schema in schemas for i in schema.inputs}
    for preset in presets.published():
        assert preset.placement in PLACEMENT_CHOICES and preset.resize in RESIZE
        assert preset.attention in ATTENTION and preset.size % 16 == preset.picture % 16 == 0
        for base in preset.sampling:
            values = preset.values(base)
            theirs = {"steps", "guidance", "width", "height"}  # on ComfyUI's own nodes
            assert set(values) - theirs <= set(inputs)
            assert values["steps"] > 0 and (values["guidance"] is None) == (base == "schnell")


def test_no_two_files_of_a_family_have_the_same_name() -> None:
    names = [(p.family, p.file.lower()) for p in presets.published()]
    assert len(set(names)) == len(names) == 39


def test_the_docs_show_the_table() -> None:
    run = "run python -m dev.docs.lora_table"
    assert lora_table.PAGE.read_text(encoding="utf-8") == lora_table.page(), run
    for path in lora_table.HELP:
        text = path.read_text(encoding="utf-8")
        assert lora_table.with_table(text) == text, run
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for preset in presets.published():
        assert f"`{preset.file}`" in readme and preset.source.partition(",")[0] in readme


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "keys", "expected"),
    [
        ("canny.safetensors", OMINI_KEYS, ("joint", "aligned", 28, 1.0)),
        ("omini/Subject_512.safetensors", OMINI_KEYS, ("joint", "right", 28, 1.5)),
        ("art\\ghibli.safetensors", OMINI_KEYS, ("joint", "left", 28, 1.5)),
        ("canny.safetensors", EASY_KEYS, ("independent", "fit", 25, 1.0)),
        ("easycontrol_ghibli.safetensors", EASY_KEYS, ("independent", "fit", 25, 1.0)),
        ("subject.safetensors", EASY_KEYS, ("independent", "easycontrol_subject", 25, 1.0)),
    ],
)
def test_published_files_go_by_name_and_family(name, keys, expected) -> None:
    answer = answer_of(name, keys, {})
    values = answer["values"]
    assert answer["known"] and answer["title"] and answer["note"]
    names = ("attention", "placement", "steps", "image_guidance_scale")
    assert tuple(values[n] for n in names) == expected


def test_another_base_model_is_sampled_in_another_way() -> None:
    dev = answer_of("subject_512.safetensors", OMINI_KEYS, {})
    schnell = answer_of("subject_512.safetensors", OMINI_KEYS, {}, "schnell")
    assert dev["bases"] == schnell["bases"] == ["dev", "schnell"]
    assert dev["values"]["guidance"] == 3.5 and dev["values"]["image_guidance_scale"] == 1.5
    assert schnell["values"]["guidance"] is None and schnell["values"]["steps"] == 8
    assert schnell["values"]["image_guidance_scale"] == 1.0
    assert answer_of("subject_512.safetensors", OMINI_KEYS, {}, "sdxl") == dev


def test_a_trained_file_speaks_for_itself_whatever_its_name() -> None:
    answer = answer_of("canny.safetensors", OMINI_KEYS, TRAINED)
    values = answer["values"]
    assert answer["known"] and answer["title"] == "canny" and answer["bases"] == ["schnell"]
    assert values["attention"] == "independent" and values["placement"] == "aligned"
    assert values["guidance"] is None


@pytest.mark.parametrize(
    ("delta", "compression", "placement", "rows", "columns"),
    [
        ("0,32", "1", "right", 0, 0),
        ("0,16", "0.5", "right", 0, 0),
        ("-32,0", "1", "above", 0, 0),
        ("0,-8", "0.5", "custom", 0, -16),
        ("4,0", "1", "custom", 4, 0),
    ],
)
def test_a_trained_place_becomes_the_nodes_own_words(
    delta, compression, placement, rows, columns
) -> None:
    scale = str(1 / float(compression))
    said = {
        "omini2.position_delta": delta,
        "omini2.compression": compression,
        "omini2.position_scale": scale,
    }
    share = float(compression)
    answer = answer_of("mine.safetensors", OMINI_KEYS, {**TRAINED, **said}, compression=share)
    values = answer["values"]
    assert values["placement"] == placement and values["position_scale"] == 1.0
    assert (values["delta_rows"], values["delta_cols"]) == (rows, columns)


@pytest.mark.parametrize("compression", [1.0, 0.5, 0.25])
@pytest.mark.parametrize("delta", ["0,0", "0,4", "0,-4", "2,-8"])
@pytest.mark.parametrize(("trained", "side"), [("1", 256), ("0.5", 128), ("0.25", 64)])
def test_what_is_filled_in_is_what_a_file_was_trained_with(
    trained, side, delta, compression, caplog
) -> None:
    """Whatever compresses the condition on its way; by what the nodes then say themselves."""
    said = {
        **TRAINED,
        "omini2.compression": trained,
        "omini2.position_delta": delta,
        "omini2.position_scale": "1" if delta != "0,0" else str(1 / float(trained)),
        "omini2.condition_size": f"{side}x{side}",
        "omini2.target_size": "256x256",
    }
    lora = random_lora("trained.safetensors", **said)
    _, answer = ask(compression=str(compression), lora=lora)
    values = answer["values"]
    given = ("placement", "delta_rows", "delta_cols", "position_scale")
    image = torch.rand(1, 256, 256, 3)
    if trained == "1" and compression != 1:
        # It was never shown a smaller condition, so where the image lies is what is kept.
        _, plain = ask(lora=lora)
        assert values == {**plain["values"], "compression": compression}
        return
    condition = ConditionEncode.execute(
        image,
        LatentVae(),
        *(values[name] for name in given),
        None,
        values["resize"],
        values["size"],
    )[0]
    condition = compact(condition, compression=compression)[0]
    with caplog.at_level(logging.WARNING):
        apply(make_model(flux_config(True)), condition, lora)
    assert caplog.text == ""


@pytest.mark.parametrize(
    "nonsense",
    [
        {"omini2.target_size": "big"},
        {"omini2.compression": "0"},
        {"omini2.compression": "nan"},
        {"omini2.position_delta": "inf,0"},
        {"omini2.position_delta": "up"},
        {"omini2.target_size": ""},
    ],
)
def test_a_file_that_says_nonsense_is_an_unknown_one(nonsense) -> None:
    answer = answer_of("mine.safetensors", OMINI_KEYS, {**TRAINED, **nonsense})
    assert not answer["known"] and answer["values"] == {}
    assert "OminiControl's do: independent" in answer["note"]


def test_how_an_unknown_file_is_treated_is_said() -> None:
    omini = answer_of("mystery.safetensors", OMINI_KEYS, {})
    easy = answer_of("mystery.safetensors", EASY_KEYS, {})
    ordinary = answer_of("style.safetensors", ["lora_unet_single_blocks_0.alpha"], {})
    assert not (omini["known"] or easy["known"] or ordinary["known"])
    assert "OminiControl's do: joint" in omini["note"]
    assert "EasyControl's do: independent" in easy["note"]
    assert "Load LoRA" in ordinary["note"]


# --- the route ---------------------------------------------------------------------------------


def test_the_route_reads_the_file_s_own_words() -> None:
    status, answer = ask(lora=random_lora("route.safetensors", **TRAINED))
    assert status == 200 and answer["known"] and answer["values"]["attention"] == "independent"
    status, answer = ask(lora=random_lora("Subject_512.safetensors"), base="schnell")
    assert status == 200 and answer["values"]["steps"] == 8


def test_the_route_knows_listed_files_only(tmp_path) -> None:
    outside = tmp_path / "secret.safetensors"
    save_file({}, outside, TRAINED)
    inside = folder_paths.get_full_path("loras", random_lora("route.safetensors"))
    for name in (str(outside), f"../{outside.name}", inside, "../loras/route.safetensors", ""):
        status, answer = ask(lora=name)
        assert status == 404 and set(answer) == {"error"}


def test_a_damaged_file_is_an_answer_too() -> None:
    name = random_lora("damaged.safetensors")
    path = folder_paths.get_full_path("loras", name)
    with open(path, "r+b") as file:
        file.truncate(100)
    status, answer = ask(lora=name)
    assert status == 200 and not answer["known"] and "can't be read" in answer["note"]


def test_answers_are_plain_json() -> None:
    assert {field.name for field in fields(usage.Sampling)} <= set(presets.published()[0].values())
    for preset in presets.published():
        json.dumps(preset.values())


# --- Apply Omini2 LoRA -------------------------------------------------------------------------


def said(caplog, name: str, condition, attention: str = "auto", **metadata: str) -> str:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        lora = random_lora(name, **metadata)
        apply(make_model(flux_config(True)), condition, lora, attention=attention)
    return caplog.text


def test_settings_that_a_published_lora_is_not_for_are_said(caplog) -> None:
    aligned, right = random_condition(4, 6), random_condition(4, 6, placement="right")
    assert said(caplog, "canny.safetensors", aligned) == ""
    assert said(caplog, "canny.safetensors", aligned, "joint") == ""
    assert "set placement to aligned" in said(caplog, "canny.safetensors", right)
    assert "trained joint" in said(caplog, "canny.safetensors", aligned, "independent")
    assert said(caplog, "subject_512.safetensors", right) == ""
    assert "set placement to right" in said(caplog, "subject_512.safetensors", aligned)
    assert said(caplog, "mystery.safetensors", right, "independent") == ""


def test_compressed_conditions_lie_where_they_lay(caplog) -> None:
    for name, options in (
        ("subject_512.safetensors", {"placement": "right"}),
        ("subject_1024_beta.safetensors", {"placement": "custom", "delta": (0, -32)}),
    ):
        condition = compact(random_condition(4, 6, **options), compression=0.5)[0]
        assert said(caplog, name, condition) == ""


def test_the_file_s_own_words_come_before_the_table(caplog) -> None:
    right = random_condition(4, 6, placement="right")
    text = said(caplog, "canny.safetensors", right, **{"omini2.integration": "false"})
    assert text == ""


def test_families_do_not_share_names() -> None:
    assert presets.find("pose.safetensors", OMINICONTROL) is None
    assert presets.find("coloring.safetensors", EASYCONTROL) is None
    assert presets.find("EasyControl-Pose.safetensors", EASYCONTROL).shows == "a pose"
