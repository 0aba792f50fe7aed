"""What references of editing models take in memory: `python -m benchmarks.reference_memory`.

Counted from the models' shapes, which tests/benchmarks/test_reference_memory.py holds to the
models themselves. Writes the table between two comments of docs/references.md.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from dev.markdown import table
from dev.paths import ROOT

PAGE = ROOT / "docs" / "references.md"
BEGIN, END = "<!-- memory -->", "<!-- /memory -->"
TOKENS = 64 * 64  # of a reference of 1024x1024 pixels, in all of these models
COUNTS = 1, 2, 4  # references
GB = 1e9
CARDS = 8, 12, 16, 24  # GB
WORKING = 2.5e9  # bytes to work in at 1024x1024, beside weights and K/V: an assumption
CHOICES = (("model", 2, "gpu"), ("fp8", 1, "gpu"), ("model", 2, "cpu"))


@dataclass(frozen=True)
class Editing:
    """An editing model.

    Attributes:
        parameters: its weights, a byte each in fp8.
        blocks: those with K/V of their own.
        kv_width: numbers in K of a token, and as many in V.
        prompts: that are evaluated at its usual cfg, each with references of its own.
    """

    name: str
    parameters: int
    blocks: int
    kv_width: int
    prompts: int = 1

    def kv_bytes(self, references: int, number: float) -> float:
        """Of so many references of a megapixel, in numbers of so many bytes, on all prompts."""
        return self.prompts * references * TOKENS * self.blocks * 2 * self.kv_width * number


MODELS = (
    Editing("FLUX.1 Kontext", 11_901_408_320, 57, 3072),
    Editing("FLUX.2 dev", 32_223_281_152, 56, 6144),
    Editing("FLUX.2 klein 9B", 9_078_581_248, 32, 4096),
    Editing("FLUX.2 klein 4B", 3_875_544_576, 25, 3072),
    Editing("Qwen-Image-Edit", 20_430_401_088, 60, 3072, prompts=2),
    Editing("Krea 2", 12_820_073_036, 28, 1536),
)


def choice(model: Editing, references: int, card: int) -> str:
    """The first of Condition Cache's settings with which all is on a card of so many GB."""
    for storage, number, place in CHOICES:
        # Off the device, those of two blocks are there at a time.
        share = 1.0 if place == "gpu" else 2 / model.blocks
        kept = share * model.kv_bytes(references, number)
        if model.parameters + kept + WORKING <= card * GB:
            return "cpu" if place == "cpu" else storage
    return "streams"


def memory() -> str:
    """The table: a line for each model."""
    head = ("model, weights in fp8", "prompts", "K/V of a reference, 16 bits", "fp8",
            *(f"{card} GB" for card in CARDS))  # fmt: skip
    return table(head, map(_row, MODELS))


def _row(model: Editing) -> Iterable[object]:
    yield f"{model.name}, {model.parameters / GB:.1f} GB"
    yield model.prompts
    for number in (2, 1):
        yield f"{model.kv_bytes(1, number) / GB:.2f} GB"
    for card in CARDS:
        choices = [choice(model, references, card) for references in COUNTS]
        yield choices[0] if len(set(choices)) == 1 else ", ".join(choices)


def with_table(text: str) -> str:
    """The page with the table between its two comments."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{memory()}\n{END}{after}"


def main() -> None:
    text = with_table(PAGE.read_text(encoding="utf-8"))
    PAGE.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
