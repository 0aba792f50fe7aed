"""Whether the model's forward goes through the hooks that conditions need.

Other extensions replace parts of it. Where a hook is never reached, conditions would do nothing
without a word; so each evaluation is counted.
"""

from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..errors import Omini2Error


class Watch:
    """Counts, in one run, how far each evaluation went.

    Attributes:
        options: the transformer options of the evaluation that is running.
        replaced_by: what stands in for the model's own forward, if anything.
    """

    def __init__(self, replacements: Mapping[Hashable, Any]) -> None:
        """Args:
        replacements: what each block was replaced with when the run started.
        """
        self.options: dict[str, Any] = {}
        self.replaced_by: str | None = None
        self._replacements = replacements
        self._expected = self._blocks = self._attentions = 0
        self._deaf = False
        self._first = True

    def begin(self, options: dict[str, Any], replaced_by: str | None) -> None:
        """Before an evaluation. Replacements that another extension put aside don't count."""
        self.options = options
        self.replaced_by = replaced_by
        self._blocks = self._attentions = 0
        self._deaf = False
        blocks = options.get("patches_replace", {}).get("dit", {})
        self._expected = sum(blocks.get(at) is own for at, own in self._replacements.items())

    def block(self) -> None:
        """A block was reached."""
        self._blocks += 1

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While the model's own block computes, which has to reach its attention."""
        before = self._attentions
        yield
        self._deaf |= self._attentions == before

    def attention(self) -> None:
        """The attention of a block was reached."""
        self._attentions += 1

    def end(self, compared: bool) -> None:
        """After an evaluation that came to its end.

        Args:
            compared: whether image guidance compares this evaluation with another one.

        Raises:
            Omini2Error: a hook that conditions need was not reached.
        """
        who = "another extension" + (f" ({self.replaced_by})" if self.replaced_by else "")
        skipped = self._blocks < self._expected
        if self._first and skipped:
            raise Omini2Error(
                f"model: {who} runs the model's blocks past ComfyUI's hooks, so that conditions "
                "can't take part; take it out of the graph."
            )
        if self._deaf:
            raise Omini2Error(
                f"model: {who} has replaced the attention of the model's blocks, so that "
                "conditions can't take part; take it out of the graph."
            )
        if compared and skipped:
            raise Omini2Error(
                f"image_guidance_scale: {who} skips blocks of the model and so mixes up the "
                "evaluations that image guidance compares; take it out of the graph, use ComfyUI's "
                "EasyCache in its place, or set image_guidance_scale to 1."
            )
        self._first = False
