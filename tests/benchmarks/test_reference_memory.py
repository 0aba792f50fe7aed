"""What references are said to take in memory, against the models themselves."""

import pytest
from helpers.full_size import FULL_SIZE, full_size

from benchmarks import reference_memory
from omini2_extension.omini2_core.host.references import family_of

MODELS = {model.name: model for model in reference_memory.MODELS}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_shapes_are_the_models_own(name: str) -> None:
    patcher, said = full_size(name), MODELS[name]
    family = family_of(patcher)
    assert family is not None
    inner = patcher.model.diffusion_model
    assert said.parameters == sum(each.numel() for each in inner.parameters())
    per_token = family.kv_bytes_per_token(patcher)
    assert said.kv_bytes(1, 2) == said.prompts * reference_memory.TOKENS * per_token
    assert said.blocks == len(family.numbers(inner))


def test_the_page_has_the_table_as_it_is_counted() -> None:
    text = reference_memory.PAGE.read_text(encoding="utf-8")
    written = reference_memory.with_table(text)
    assert text == written, "run python -m benchmarks.reference_memory"


def test_the_first_setting_that_fits() -> None:
    model = reference_memory.Editing("a", 7_000_000_000, 10, 2**18, prompts=1)
    kv = 4096 * 10 * 2 * 2**18 * 2  # 42.9e9 bytes in 16 bits
    assert model.kv_bytes(1, 2) == kv
    sizes = {53: "model", 31: "fp8", 19: "cpu", 18: "streams"}  # 7 + 2.5 + 42.9, 21.5, 8.6
    assert {card: reference_memory.choice(model, 1, card) for card in sizes} == sizes
