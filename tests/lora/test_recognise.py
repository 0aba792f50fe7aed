"""Which family a file is taken for, and what is said where that isn't certain."""

import folder_paths
import pytest
from safetensors.torch import load_file
from tiny import apply, flux_config, make_model, random_condition, random_lora, save_lora

from omini2_extension.omini2_core.errors import Omini2Error
from omini2_extension.omini2_core.host.attach import get_setup
from omini2_extension.omini2_core.lora.family import FAMILIES, FAMILY_CHOICES, NO_LORA
from omini2_extension.omini2_core.lora.recognise import answer, misplaced, recognise, without_lora

PLAIN = [
    f"transformer.transformer_blocks.0.{module}.lora_{part}.weight"
    for module in ("norm1.linear", "attn.to_q")
    for part in "AB"
]
EASY = [
    f"single_transformer_blocks.0.attn.processor.q_loras.0.{part}.weight" for part in ("down", "up")
]


@pytest.mark.parametrize(
    ("name", "keys", "family", "doubted"),
    [
        ("coloring.safetensors", PLAIN, "OminiControl", False),
        ("remove.safetensors", PLAIN, "IEAP", False),
        ("weights/bg.safetensors", PLAIN, "IEAP", False),
        ("omnipaint_remove.safetensors", PLAIN, "OmniPaint", False),
        ("subject.safetensors", PLAIN, "UniCombine", False),
        ("subject.safetensors", EASY, "EasyControl", False),
        ("OmniConsistency.safetensors", EASY, "OmniConsistency", False),
        ("canny.safetensors", EASY, "EasyControl", False),
        ("canny.safetensors", PLAIN, "OminiControl", True),
        ("experimental/canny.safetensors", PLAIN, "OminiControl", False),
        ("Condition_LoRA\\depth.safetensors", PLAIN, "UniCombine", False),
        ("UniCombine/fill.safetensors", PLAIN, "UniCombine", False),
        ("unicombine-fill.safetensors", PLAIN, "UniCombine", False),
        ("ominicontrol_fill.safetensors", PLAIN, "OminiControl", False),
        ("oye-cartoon/pytorch_lora_weights.safetensors", PLAIN, "OminiControl", True),
        ("mine.safetensors", PLAIN, "OminiControl", True),
        ("mine.safetensors", EASY, "EasyControl", True),
    ],
)
def test_a_file_goes_by_name_and_keys(name, keys, family, doubted) -> None:
    found = recognise(name, keys, {})
    assert found.family.name == family
    assert bool(found.doubts) is doubted
    for doubt in found.doubts:
        assert doubt.sentence.startswith("family: ") and f"runs as {family}'s" in doubt.sentence
        assert doubt.sentence.endswith("set family.")
        for remedy in doubt.remedies:  # whichever of them is chosen leaves no doubt
            chosen = recognise(name, keys, {}, remedy.values["family"])
            assert not chosen.doubts and f"{chosen.family.name}" in doubt.sentence
    shown = answer(name, keys, {})
    assert shown["values"].get("family", "auto") == ("auto" if doubted else family)


def test_what_a_file_says_of_itself_goes_before_its_name() -> None:
    for metadata, family in (
        ({"omini2.family": "UniCombine"}, "UniCombine"),
        ({"omini2.independent_condition": "false"}, "OminiControl"),  # of an older trainer
        ({"omini2.family": "EasyControl"}, "IEAP"),  # which the keys say it isn't
        ({"omini2.family": "nonsense"}, "IEAP"),
    ):
        found = recognise("remove.safetensors", PLAIN, metadata)
        assert (found.family.name, found.doubts) == (family, ())


def test_what_the_person_says_goes_before_all() -> None:
    for family in FAMILIES:
        if family.way == "plain":
            found = recognise("canny.safetensors", PLAIN, {"omini2.family": "IEAP"}, family.name)
            assert found.family is family and not found.doubts
    with pytest.raises(Omini2Error, match=r"^family: a.safetensors doesn't have the keys of Easy"):
        recognise("a.safetensors", PLAIN, {}, "EasyControl")
    with pytest.raises(Omini2Error, match=r"^lora_name: PhotoDoodle's conditions have no LoRA"):
        recognise("a.safetensors", PLAIN, {}, "PhotoDoodle")
    with pytest.raises(Omini2Error, match=r"^family: Other is not on offer; choose auto or Omini"):
        recognise("a.safetensors", PLAIN, {}, "Other")


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("Denoising_LoRA/depth_canny_union.safetensors", PLAIN),
        ("subject_fill_union/pytorch_lora_weights.safetensors", PLAIN),
        ("sksmagiceffects.safetensors", PLAIN),
        (
            "pretrain.safetensors",
            [*PLAIN, "transformer.transformer_blocks.0.attn.add_q_proj.alpha"],
        ),
    ],
)
def test_loras_for_the_picture_are_refused_by_name(name, keys) -> None:
    """UniCombine's have the keys of condition LoRAs, so that nothing else would tell."""
    with pytest.raises(Omini2Error, match=r"^lora_name: .*LoRA for the picture.*with Load LoRA"):
        recognise(name, keys, {})
    assert "Load LoRA" in answer(name, keys, {})["note"]
    if keys is PLAIN:
        assert recognise(name, keys, {}, "UniCombine").family.name == "UniCombine"
    else:
        with pytest.raises(Omini2Error, match="PhotoDoodle's conditions have no LoRA of their own"):
            recognise(name, keys, {}, "PhotoDoodle")


def test_an_ordinary_lora_of_attention_only_is_said() -> None:
    keys = [key for key in PLAIN if "attn" in key]
    doubts = recognise("style.safetensors", keys, {}).doubts
    assert "acts on attention only" in doubts[-1].sentence and "Load LoRA" in doubts[-1].sentence
    assert "Load LoRA" in answer("style.safetensors", keys, {})["note"]
    for quiet in (
        recognise("style.safetensors", PLAIN, {}),
        recognise("style.safetensors", keys, {"omini2.family": "OminiControl"}),
        recognise("style.safetensors", keys, {}, "OminiControl"),
    ):
        assert not any("attention only" in doubt.sentence for doubt in quiet.doubts)


@pytest.mark.parametrize("family", FAMILY_CHOICES)
def test_no_lora_is_for_families_without_one(family) -> None:
    model, condition = make_model(flux_config(True)), random_condition()
    if family == "PhotoDoodle":
        applied = get_setup(apply(model, condition, NO_LORA, family=family)).branches[0]
        assert applied.lora.family is without_lora(family) and not applied.lora.deltas
        return
    with pytest.raises(Omini2Error, match=r"^lora_name: \(none\) is for PhotoDoodle"):
        apply(model, condition, NO_LORA, family=family)


def test_the_editor_fills_in_photodoodles_without_a_file() -> None:
    shown = answer(NO_LORA, [], {})
    assert shown["known"] and shown["values"]["family"] == "PhotoDoodle"


def test_the_node_says_the_doubt(caplog) -> None:
    model, condition = make_model(flux_config(True)), random_condition()
    apply(model, condition, random_lora("known.safetensors"))
    assert not caplog.records
    tensors = load_file(folder_paths.get_full_path("loras", "known.safetensors"))
    apply(model, condition, save_lora("strange.safetensors", tensors))
    assert "strange.safetensors may be OminiControl, IEAP, UniCombine or OmniPaint" in caplog.text
    caplog.clear()
    apply(model, condition, "strange.safetensors", family="IEAP")
    assert not caplog.records


# --- Load LoRA ---------------------------------------------------------------------------------

WHOLE = [*PLAIN, *(f"transformer.x_embedder.lora_{part}.weight" for part in "AB")]
TEXT = "transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("name", "keys", "metadata", "families"),
    [
        ("coloring.safetensors", WHOLE, {}, "OminiControl"),
        ("canny.safetensors", WHOLE, {}, "OminiControl or UniCombine"),
        ("UniCombine/canny.safetensors", WHOLE, {}, "UniCombine"),
        ("omnipaint_insert.safetensors", WHOLE, {}, "OmniPaint"),
        ("anything.safetensors", EASY, {}, "EasyControl"),
        ("mine.safetensors", PLAIN, {"omini2.family": "OminiControl"}, "OminiControl"),
        ("mine.safetensors", PLAIN, {"omini2.independent_condition": "true"}, "OminiControl"),
        # Ordinary LoRAs, whatever they are called, and condition LoRAs' names on them.
        ("style.safetensors", WHOLE, {}, None),
        ("ghibli.safetensors", [key for key in PLAIN if "attn" in key], {}, None),
        ("canny.safetensors", PLAIN, {}, None),
        ("canny.safetensors", [*WHOLE, TEXT, TEXT.replace("_A", "_B")], {}, None),
        ("canny.safetensors", ["lora_unet_input_blocks_1_1.lora_down.weight"], {}, None),
        ("canny.safetensors", [], {}, None),
        # What its family's own code, or this project's advice, has in Load LoRA.
        ("pretrain.safetensors", WHOLE, {}, None),
        ("sksmagiceffects.safetensors", WHOLE, {}, None),
        ("Denoising_LoRA/subject_canny_union.safetensors", WHOLE, {}, None),
        ("weights/remove.safetensors", WHOLE, {}, None),
        ("mine.safetensors", WHOLE, {"omini2.family": "IEAP"}, None),
    ],
)
def test_only_condition_loras_are_told_apart_from_load_loras(
    name, keys, metadata, families
) -> None:
    said = misplaced(name, keys, metadata)
    assert said == "" if families is None else f"a LoRA for conditions ({families})," in said
