"""What Apply Omini2 LoRA says when settings contradict what the file was trained with."""

import logging

import pytest
import torch
from tiny import apply, compact, flux_config, make_model, random_condition, random_lora

TRAINED = {
    "omini2.independent_condition": "true",
    "omini2.position_delta": "0,-3",
    "omini2.position_scale": "2",
    "omini2.condition_size": "96x64",
    "omini2.integration": "false",
}
AS_TRAINED = {"placement": "custom", "delta": (0, -3), "position_scale": 2.0}


def said(caplog, condition, metadata, attention="auto") -> str:
    name = random_lora("recipe.safetensors", **metadata)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        apply(make_model(flux_config(True)), condition, name, attention=attention)
    return caplog.text


def test_settings_as_trained_pass_in_silence(caplog) -> None:
    condition = random_condition(4, 6, **AS_TRAINED)
    assert said(caplog, condition, TRAINED) == ""
    assert said(caplog, condition, TRAINED, "independent") == ""
    # Files that say nothing, as all published ones, and files that say nonsense.
    assert said(caplog, condition, {}) == ""
    nonsense = {"omini2.position_delta": "up", "omini2.condition_size": "big"}
    assert said(caplog, condition, nonsense, "joint") == ""


def test_compact_tokens_give_what_a_compact_lora_wants(caplog) -> None:
    trained = {**TRAINED, "omini2.position_delta": "0,0", "omini2.condition_size": "48x32"}
    whole = random_condition(4, 6)
    assert "48x32" in said(caplog, whole, trained)
    assert said(caplog, compact(whole, compression=0.5)[0], trained) == ""
    uncorrected = compact(whole, compression=0.5, position_correcting=False)[0]
    assert "position_scale" in said(caplog, uncorrected, trained)
    assert said(caplog, random_condition(2, 3, placement="fit"), trained) == ""
    several = {**trained, "omini2.condition_size": "96x64", "omini2.compression": "1,0.5"}
    assert said(caplog, compact(whole, compression=0.5)[0], several) == ""


@pytest.mark.parametrize(
    ("hw", "options", "attention", "words"),
    [
        ((4, 6), AS_TRAINED, "joint", "attention: recipe.safetensors was trained independent"),
        ((4, 4), AS_TRAINED, "auto", "96x64 pixels, this one has 64x64"),
        ((4, 6), {"position_scale": 2.0}, "auto", "custom with delta_rows 0 and delta_cols -3"),
        ((4, 6), {"placement": "left", "position_scale": 2.0}, "auto", "placement: "),
        ((4, 6), {**AS_TRAINED, "delta": (0, -6), "position_scale": 1.0}, "auto", "position_scale"),
    ],
)
def test_what_contradicts_the_file_is_said(caplog, hw, options, attention, words) -> None:
    assert words in said(caplog, random_condition(*hw, **options), TRAINED, attention)


def test_integration_and_its_loras_belong_together(caplog) -> None:
    paint = torch.zeros(1, 96, 96)
    paint[:, 32:64, 32:64] = 1
    whole = random_condition(6, 6)
    part = compact(whole, token_integration=True, mask=paint)[0]
    for trained, condition, word in (("false", part, " off "), ("true", whole, " on ")):
        assert f"token_integration{word}" in said(
            caplog, condition, {"omini2.integration": trained}
        )
    assert said(caplog, part, {"omini2.integration": "true"}) == ""
