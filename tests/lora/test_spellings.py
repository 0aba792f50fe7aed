"""Every spelling of LoRA files that people have: read as what it is, or refused by its name."""

import pytest

from dev.docs import spellings
from dev.docs.spellings import DOUBTED, RUNS, SAME, SPELLINGS, Spelling
from omini2_extension.omini2_core.host.folders import lora_path, read_header
from omini2_extension.omini2_core.lora.recognise import answer

# What each has to come to: a part of its sentence, where it isn't one that runs.
REFUSED = {
    "`.pt`": "is not a .safetensors file",
    "`.bin`, nested under `state_dict`": "is not a .safetensors file",
    "`.ckpt`, nested under `state_dict`": "is not a .safetensors file",
    "EasyControl's of two conditions": "holds LoRAs for several conditions",
    "DoRA, `dora_scale`": "is a DoRA",
    "DoRA, `lora_magnitude_vector`": "is a DoRA",
    "`lora_B.bias`": "is a LoRA with biases",
    "fp8 with `scale_weight`": "is quantised to fp8 with scales",
    "LoKr": "is a LoKr",
    "LoHa": "is a LoHa",
    "XLabs'": "in XLabs' format",
    "with a text encoder's": "for the text encoder as well",
    "DreamO's": "is DreamO's",
    "an ordinary LoRA": "is an ordinary LoRA",
}
RUN = {
    **dict.fromkeys(("fp64", "fp16", "bf16", "fp8 e4m3", "fp8 e5m2"), RUNS),
    **dict.fromkeys(("rank 1", "rank 128", "a rank of its own for each layer"), RUNS),
    "an ordinary LoRA of attention only": DOUBTED,
}


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return {}


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.words)
def test_a_spelling(spelling: Spelling, outcomes) -> None:
    outcomes[spelling.words] = found = spellings.outcome(spelling)
    if spelling.words in REFUSED:
        assert REFUSED[spelling.words] in found
        keys, metadata = read_header(lora_path(spelling.name))
        note = answer(spelling.name, keys, metadata)["note"]
        assert note.replace("spelt", "FILE") == found
    else:
        assert found == RUN.get(spelling.words, SAME)


def test_the_page_shows_them(outcomes) -> None:
    assert len(SPELLINGS) == 58 == len({spelling.words for spelling in SPELLINGS})
    for spelling in SPELLINGS:
        if spelling.words not in outcomes:  # where this test runs alone
            outcomes[spelling.words] = spellings.outcome(spelling)
    page = spellings.page([outcomes[spelling.words] for spelling in SPELLINGS])
    assert spellings.PAGE.read_text(encoding="utf-8") == page, "run python -m dev.docs.spellings"
