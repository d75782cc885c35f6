"""Which sequences run in a step, on which rank, with how many tokens: continuous batching (Yu et al., 2022, Orca).

The rule is the native engine's: a sequence has known tokens and computed ones, and a step brings some sequences
closer to having all known tokens computed; one that gets there draws its next. Prefill, decode, recomputation after a
preemption and going on with somebody else's answer are all this one rule. Here sequences are dealt out to ranks, each
of which has room for so many pages of keys and values.

No tensor, no I/O; time is only noted.
"""

import random
import time
from collections import deque
from collections.abc import Sequence as Seq
from dataclasses import dataclass

from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.backends.deepspeed_worker.launch import Result, Step, Work
from localmoe.core.errors import InvalidRequestError, OverloadedError
from localmoe.core.events import EngineState
from localmoe.core.request import FinishReason, Request, RequestFailed, TokenChunk, TokenLogprob, Usage


@dataclass(frozen=True, kw_only=True)
class Room:
    """What there is to share out."""

    num_ranks: int
    """That compute sequences of their own."""
    num_pages: int
    """On each of them."""
    page_tokens: int
    vocab_size: int
    max_context_tokens: int


class _Sequence:
    """A request on its way."""

    def __init__(self, sequence_id: int, request: Request) -> None:
        self.id = sequence_id
        self.request = request
        seed = request.sampling.seed
        self.seed = random.getrandbits(63) if seed is None else seed
        self.prompt_ids = request.prompt_ids
        self.output_ids = list(request.resumed_ids)
        self.num_computed = 0
        self.num_pages = 0
        self.num_in_step = 0
        """Tokens that the step under way computes."""
        self.rank = 0
        self.prompt_logprobs: list[TokenLogprob] = []
        self.sent_any = False
        self.arrived_s = time.monotonic()
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None

    @property
    def num_to_compute(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids) - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None and not self.sent_any

    def tokens(self, start: int, end: int) -> list[int]:
        split = len(self.prompt_ids)
        return self.prompt_ids[start:end] + self.output_ids[max(start - split, 0) : max(end - split, 0)]

    def work(self, count: int) -> Work:
        """Its next tokens to compute."""
        sampling, start, end = self.request.sampling, self.num_computed, self.num_computed + count
        penalised = sampling.repetition_penalty != 1.0 or sampling.presence_penalty or sampling.frequency_penalty
        return Work(
            sequence_id=self.id,
            token_ids=self.tokens(start, end),
            start=start,
            samples=count == self.num_to_compute and sampling.max_tokens > 0,
            sampling=sampling,
            seed=self.seed,
            prompt_ids=self.prompt_ids if penalised else [],
            output_ids=self.output_ids if penalised else [],
            targets=self.prompt_ids[start + 1 : end + 1] if self.scores_prompt else [],
        )

    def usage(self) -> Usage:
        assert self.scheduled_s is not None
        assert self.first_token_s is not None
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.output_ids),
            queue_s=self.scheduled_s - self.arrived_s,
            prefill_s=self.first_token_s - self.scheduled_s,
        )


class Batch:
    """Waiting and running sequences.

    Args:
        model: the name it is served under.
        config: limits of a step and of the queue.
        room: for sequences.
    """

    def __init__(self, model: str, config: DeepSpeedConfig, room: Room) -> None:
        self._model = model
        self._config = config
        self._room = room
        self._free_pages = [room.num_pages] * room.num_ranks
        self._forgotten: list[list[int]] = [[] for _ in range(room.num_ranks)]
        """Sequences that left each rank since the last step."""
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._by_request: dict[str, _Sequence] = {}
        self._next_id = 0
        self._num_preemptions = 0

    @property
    def has_work(self) -> bool:
        """Whether there is something to compute, or to forget."""
        return bool(self._running or self._waiting or any(self._forgotten))

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            OverloadedError: the queue is full.
            InvalidRequestError: token ids that the model does not have, or more of them than there is room for.
        """
        sampling, room = request.sampling, self._room
        # Checked at this door whatever the gateway checked: one bad id would fail everybody in its step.
        ids = [*request.prompt_ids, *request.resumed_ids, *sampling.logit_bias]
        if not request.prompt_ids or min(ids) < 0 or max(ids) >= room.vocab_size:
            raise InvalidRequestError(f"token ids must be from 0 to {room.vocab_size - 1}, and at least one")
        if len(request.prompt_ids) + sampling.max_tokens > room.max_context_tokens:
            raise InvalidRequestError(
                f"{len(request.prompt_ids)} prompt tokens and {sampling.max_tokens} to generate exceed the engine's "
                f"context of {room.max_context_tokens}"
            )
        if len(request.resumed_ids) >= max(1, sampling.max_tokens):
            raise InvalidRequestError(
                f"{len(request.resumed_ids)} tokens were generated already, of at most {sampling.max_tokens}"
            )
        if max(sampling.logprobs or 0, sampling.prompt_logprobs or 0) > room.vocab_size:
            raise InvalidRequestError(f"there are {room.vocab_size} tokens, so no more alternatives to report")
        if len(self._waiting) >= self._config.max_num_queued:
            raise OverloadedError(f"the engine's queue is full ({self._config.max_num_queued} requests)")
        sequence = _Sequence(self._next_id, request)
        self._next_id += 1
        self._by_request[request.id] = sequence
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are those that finished meanwhile."""
        sequence = self._by_request.get(request_id)
        if sequence is not None:
            self._remove(sequence)

    def schedule(self) -> list[Step]:
        """The next step of each rank."""
        work: list[dict[int, Work]] = [{} for _ in self._free_pages]
        budgets = [self._config.max_num_batched_tokens] * len(work)
        preemptions_before = self._num_preemptions
        # Those who generate come first, so that no long prompt holds them up.
        for sequence in sorted(self._running, key=lambda s: s.num_to_compute > 1):
            rank = sequence.rank
            count = min(sequence.num_to_compute, budgets[rank])
            if count == 0 or sequence not in self._running:
                continue
            if self._make_room(sequence, count, work[rank]):
                work[rank][sequence.id] = sequence.work(count)
                budgets[rank] -= count
        if self._num_preemptions == preemptions_before:
            self._admit(work, budgets)
        forgotten, self._forgotten = self._forgotten, [[] for _ in work]
        computes = any(work)
        return [
            Step(forget=forget, work=list(parts.values()), computes=computes)
            for forget, parts in zip(forgotten, work, strict=True)
        ]

    def update(self, results: Seq[Result]) -> list[TokenChunk | RequestFailed]:
        """Take over what a step computed; returns what its requests get to see, finished ones included."""
        outputs: list[TokenChunk | RequestFailed] = []
        running = {sequence.id: sequence for sequence in self._running}
        for result in results:
            sequence = running[result.sequence_id]
            if result.fault is not None:
                self._remove(sequence)
                outputs.append(RequestFailed(request_id=sequence.request.id, message=result.fault))
                continue
            sequence.prompt_logprobs += result.prompt_logprobs
            sequence.num_computed += sequence.num_in_step
            if sequence.num_to_compute == 0:
                outputs.append(self._advance(sequence, result))
        return outputs

    def fail(self, steps: Seq[Step], message: str) -> list[TokenChunk | RequestFailed]:
        """Drop every sequence of a step that could not be computed."""
        return self.update(
            [Result(sequence_id=work.sequence_id, fault=message) for step in steps for work in step.work]
        )

    def state(self) -> EngineState:
        """Gauges and totals as of now."""
        num_pages = self._room.num_pages * self._room.num_ranks
        return EngineState(
            model=self._model,
            num_running=len(self._running),
            num_waiting=len(self._waiting),
            kv_blocks_used=num_pages - sum(self._free_pages),
            kv_blocks_total=num_pages,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
            num_preemptions=self._num_preemptions,
            num_draft_tokens=0,
            num_accepted_tokens=0,
        )

    def _admit(self, work: list[dict[int, Work]], budgets: list[int]) -> None:
        """Begin with waiting sequences, in order, as long as there is room for the next one's first chunk."""
        while self._waiting and len(self._running) < self._config.max_num_seqs:
            sequence = self._waiting[0]
            rank = max(range(len(work)), key=lambda rank: (budgets[rank] > 0, self._free_pages[rank], -rank))
            count = min(sequence.num_to_compute, budgets[rank])
            if count == 0 or self._pages(count) > self._free_pages[rank]:
                return
            self._waiting.popleft()
            self._running.append(sequence)
            sequence.rank = rank
            sequence.scheduled_s = sequence.scheduled_s or time.monotonic()
            self._make_room(sequence, count, work[rank])
            work[rank][sequence.id] = sequence.work(count)
            budgets[rank] -= count

    def _make_room(self, sequence: _Sequence, count: int, work: dict[int, Work]) -> bool:
        """Give a running sequence the pages for `count` more tokens, preempting its rank's youngest if need be."""
        rank, needed = sequence.rank, self._pages(sequence.num_computed + count) - sequence.num_pages
        while needed > self._free_pages[rank]:
            youngest = next(other for other in reversed(self._running) if other.rank == rank)
            self._preempt(youngest)
            work.pop(youngest.id, None)
            if youngest is sequence:
                return False
        self._free_pages[rank] -= needed
        sequence.num_pages += needed
        sequence.num_in_step = count
        return True

    def _preempt(self, sequence: _Sequence) -> None:
        """Back to the head of the queue; computed anew later."""
        self._running.remove(sequence)
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self._num_preemptions += 1

    def _remove(self, sequence: _Sequence) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.remove(sequence)
        del self._by_request[sequence.request.id]

    def _release(self, sequence: _Sequence) -> None:
        self._free_pages[sequence.rank] += sequence.num_pages
        self._forgotten[sequence.rank].append(sequence.id)
        sequence.num_pages = sequence.num_computed = 0
        if sequence.scores_prompt:
            sequence.prompt_logprobs = []

    def _advance(self, sequence: _Sequence, result: Result) -> TokenChunk:
        """All known tokens were computed, and a token drawn if there are to be any: see whether the sequence ends."""
        sampling, finish = sequence.request.sampling, None
        sequence.first_token_s = sequence.first_token_s or time.monotonic()
        drawn = [] if result.token_id is None else [result.token_id]
        sequence.output_ids += drawn
        if drawn and drawn[-1] in sampling.stop_token_ids:
            finish = FinishReason.STOP
        elif len(sequence.output_ids) >= sampling.max_tokens:
            finish = FinishReason.LENGTH
        scores = sequence.prompt_logprobs if sequence.scores_prompt else None
        says_usage = finish is not None or not sequence.sent_any
        sequence.sent_any, sequence.prompt_logprobs = True, []
        if finish is not None:
            self._remove(sequence)
        return TokenChunk(
            request_id=sequence.request.id,
            token_ids=drawn,
            logprobs=[] if result.logprob is None else [result.logprob],
            prompt_logprobs=scores,
            finish_reason=finish,
            usage=sequence.usage() if says_usage else None,
        )

    def _pages(self, num_tokens: int) -> int:
        return -(-num_tokens // self._room.page_tokens)
