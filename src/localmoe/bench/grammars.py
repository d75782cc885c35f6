"""What following a grammar adds to a step."""

import statistics
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from localmoe.core.plans import BatchPlan, StepResult
from localmoe.core.protocols import TokenMatcher
from localmoe.core.request import Grammar, Request, SamplingParams
from localmoe.engine.grammars import Grammars, Masks

if TYPE_CHECKING:
    from localmoe.bench.engine import StepBench

PAIRS = 32
WARM_PAIRS = 4
"""At the start, which are not counted."""
# Long enough that no stream completes it.
_GRAMMAR = Grammar(
    kind="json_schema",
    source="""{"type": "array", "minItems": 1000, "items": {"type": "object", "properties":
    {"name": {"type": "string"}, "size": {"type": "number"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "size", "tags"], "additionalProperties": false}}""",
)


class GrammarStreams:
    """Streams of which each follows a JSON schema.

    Args:
        tokenizer_path: directory of the model's tokenizer.
        vocab_size: of the model.
        device: where its logits are.
    """

    def __init__(self, tokenizer_path: Path, vocab_size: int, device: torch.device, num_streams: int) -> None:
        self.matchers: list[TokenMatcher] = []
        self._grammars = Grammars(vocab_size, device)
        self._grammars.tokenizer_path = tokenizer_path
        sampling = SamplingParams(max_tokens=1, grammar=_GRAMMAR)
        for stream in range(num_streams):
            self._grammars.compile(Request(id=str(stream), model="", prompt_ids=[0], sampling=sampling))
        while self._grammars.num_pending:
            self._grammars.wait()
            failed = self._grammars.hand_over(lambda _, matcher: self.matchers.append(matcher))
            assert not failed, failed

    def begin_masks(self, plan: BatchPlan) -> dict[int, Future[Masks]]:
        """See `Grammars.begin_masks`."""
        return self._grammars.begin_masks(plan)

    def take(self, plan: BatchPlan, results: Mapping[int, StepResult]) -> None:
        """Go on with what was drawn."""
        for step in plan.sequences:
            if step.matcher is not None:
                step.matcher.take(results[step.sequence_id].token_ids)


def grammar_ms(bench: "StepBench", tokenizer_path: Path, num_streams: int) -> float:
    """What a decode step takes longer: the median of pairs, one step without and one with grammars, since a machine's
    speed changes more from minute to minute than by that."""
    streams = GrammarStreams(tokenizer_path, bench.vocab_size, bench.device, num_streams)
    differences_s = []
    for position in range(WARM_PAIRS + PAIRS):
        order = (None, streams) if position % 2 else (streams, None)  # the second may find what the first has read
        times_s = {followed: bench.step(num_streams, 1, position, followed)[0] for followed in order}
        differences_s.append(times_s[streams] - times_s[None])
    return 1e3 * statistics.median(differences_s[WARM_PAIRS:])
