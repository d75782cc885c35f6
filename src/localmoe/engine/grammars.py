"""Grammars beside the engine's steps: what takes long is done in threads while the model computes.

A request with a grammar reaches the scheduler when that has been compiled. From then on each draw needs a mask.
What may come depends on the output so far and on drafts only, so masks are begun before the forward pass and needed
after it. In between a matcher belongs to the thread that computes its masks, else to the engine's: no locks.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from torch import Tensor

from localmoe.core.errors import InvalidRequestError, LocalMoEError, OverloadedError
from localmoe.core.plans import BatchPlan
from localmoe.core.protocols import TokenMatcher
from localmoe.core.request import Request, RequestFailed
from localmoe.engine.sampler import mask_of
from localmoe.text.grammar import GrammarCompiler
from localmoe.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_NUM_MASK_THREADS = 4
_STACK_BYTES = 1 << 26
"""Of a thread that compiles, by recursion; far more than where grammars are tried. Only what is used takes memory."""
_WAIT_S = 0.01
"""For a grammar, where there is nothing else to do."""

Masks = list[Tensor]
"""One for each draw of a sequence's step; see `sampler.mask_of`."""


class Grammars:
    """Requests whose grammars are being compiled, and masks of those that are running.

    Args:
        vocab_size: of the model.
        device: where its logits are.
    """

    tokenizer_path: Path | None = None
    """Directory of the model's tokenizer; None: there are no grammars."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._compiler: GrammarCompiler | None = None
        self._pending: dict[str, tuple[Request, Future[TokenMatcher]]] = {}
        # A grammar that takes long keeps others waiting to be compiled, but no masks.
        self._compiling: ThreadPoolExecutor | None = None
        self._masking: ThreadPoolExecutor | None = None

    @property
    def num_pending(self) -> int:
        """Requests that are not handed over yet."""
        return len(self._pending)

    def compile(self, request: Request) -> None:
        """Begin to compile a request's grammar.

        Raises:
            InvalidRequestError: there is no tokenizer.
        """
        if self.tokenizer_path is None:
            raise InvalidRequestError("this engine was given no tokenizer, and takes no grammars")
        if self._compiling is None:
            self._compiling = _started_pool(1)
            self._masking = _started_pool(_NUM_MASK_THREADS)
        self._pending[request.id] = request, self._compiling.submit(self._matcher, request, self.tokenizer_path)

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are those that were handed over."""
        if found := self._pending.pop(request_id, None):
            found[1].cancel()

    def hand_over(self, add: Callable[[Request, TokenMatcher], None]) -> list[RequestFailed]:
        """Give on requests whose grammars are compiled; returns those that cannot be given on."""
        failed = []
        for request, future in [pending for pending in self._pending.values() if pending[1].done()]:
            del self._pending[request.id]
            error = future.exception()
            if error is None:
                try:
                    add(request, future.result())
                    continue
                except OverloadedError as full:
                    error = full
            elif not isinstance(error, LocalMoEError):
                logger.error("a grammar could not be compiled", exc_info=error)
            invalid, overloaded = (isinstance(error, kind) for kind in (InvalidRequestError, OverloadedError))
            failed.append(
                RequestFailed(request_id=request.id, message=str(error), invalid=invalid, overloaded=overloaded)
            )
        return failed

    def wait(self) -> None:
        """Return soon, or when a grammar has been compiled, if any is being."""
        wait([future for _, future in self._pending.values()], _WAIT_S, FIRST_COMPLETED)

    def begin_masks(self, plan: BatchPlan) -> dict[int, "Future[Masks]"]:
        """Begin to find out what may not come, for each sequence that draws by a grammar."""
        return {
            step.sequence_id: self._masking.submit(self._masks, step.matcher, step.draft_ids)
            for step in plan.sequences
            if step.matcher is not None and step.samples and self._masking is not None
        }

    def _matcher(self, request: Request, tokenizer_path: Path) -> TokenMatcher:
        if self._compiler is None:
            self._compiler = GrammarCompiler(Tokenizer.load(tokenizer_path), self._vocab_size)
        sampling = request.sampling
        assert sampling.grammar is not None, "it would not be here"
        return self._compiler.matcher(
            sampling.grammar, stop_token_ids=sampling.stop_token_ids, resumed_ids=request.resumed_ids
        )

    def _masks(self, matcher: TokenMatcher, draft_ids: Sequence[int]) -> Masks:
        return [mask_of(allowed, self._vocab_size, self._device) for allowed in matcher.allowed(draft_ids)]


def _started_pool(num_threads: int) -> ThreadPoolExecutor:
    """With its threads running, which have large stacks."""
    pool, started = ThreadPoolExecutor(num_threads, thread_name_prefix="grammar"), threading.Barrier(num_threads)
    usual_bytes = threading.stack_size(_STACK_BYTES)
    try:
        list(pool.map(lambda _: started.wait(), range(num_threads)))
    finally:
        threading.stack_size(usual_bytes)
    return pool
