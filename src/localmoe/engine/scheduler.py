"""Which sequences run in a step, and with how many tokens: continuous batching (Yu et al., 2022, Orca).

Every sequence has known tokens (its prompt and what was generated) and computed ones, whose keys and values are
cached. A step brings some sequences closer to having all known tokens computed; one that gets there draws its
next token. Prefill, decode and recomputation after a preemption are all this one rule. Sequences with a single
token to go come first, so a long prompt, computed in chunks with what is left of the token budget, never holds
up those who are generating (chunked prefill; Agrawal et al., 2023, Sarathi).

When every sequence of a step has but one token to go, drafts may be added to it (see `speculation`). They take
what budget and blocks are left, and only those that prove right ever count as known.

No tensor, no I/O; time is only noted. What steps took decides how much is drafted, never which tokens come.
"""

import random
import time
from collections import deque
from collections.abc import Mapping, Sequence

from localmoe.core.errors import EngineFaultError, OverloadedError
from localmoe.core.plans import BatchPlan, SequenceStep, StepResult
from localmoe.core.protocols import TokenMatcher
from localmoe.core.request import FinishReason, Request, RequestFailed, TokenChunk, TokenLogprob, Usage
from localmoe.engine.block_pool import BlockPool, block_name, root_name
from localmoe.engine.config import EngineConfig
from localmoe.engine.embedding import added, embedding
from localmoe.engine.speculation import MAX_STEP_TOKENS, PromptLookup, SpeculationController


class _Sequence:
    """A request on its way. Mutable, and owned by the scheduler alone."""

    def __init__(self, sequence_id: int, request: Request, matcher: TokenMatcher | None) -> None:
        self.id = sequence_id
        self.request = request
        self.matcher = matcher
        """After its output so far."""
        seed = request.sampling.seed
        self.seed = random.getrandbits(63) if seed is None else seed
        self.prompt_ids = request.prompt_ids
        self.output_ids = list(request.resumed_ids)
        self.num_computed = 0
        self.num_cached = 0
        self.blocks: list[int] = []
        self.names: list[bytes] = []
        """Of its leading blocks, as far as anybody asked."""
        self.num_published = 0
        """Leading blocks that others can find."""
        self.prompt_logprobs: list[TokenLogprob] = []
        self.hidden_sums: tuple[int, ...] = ()
        """Of the positions computed so far, where its embedding is wanted."""
        self.lookup: PromptLookup | None = None
        """Made when first asked for a draft."""
        self.speculates = True
        """Until a step with a draft had no result."""
        self.sent_any = False
        self.arrived_s = time.monotonic()
        self.scheduled_s: float | None = None
        self.first_token_s: float | None = None

    @property
    def num_known(self) -> int:
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_to_compute(self) -> int:
        return self.num_known - self.num_computed

    def block_names(self, count: int, block_tokens: int) -> list[bytes]:
        """Names of its first `count` blocks. Known tokens never change, so each is computed once."""
        while len(self.names) < count:
            start = len(self.names) * block_tokens
            parent = self.names[-1] if self.names else root_name(self.request.cache_scope)
            self.names.append(block_name(parent, self.tokens(start, start + block_tokens)))
        return self.names[:count]

    def tokens(self, start: int, end: int) -> list[int]:
        split = len(self.prompt_ids)
        return self.prompt_ids[start:end] + self.output_ids[max(start - split, 0) : max(end - split, 0)]

    def draft(self) -> tuple[float, list[int]]:
        """A guess at the tokens to come, none of which would end the sequence, and the chance of each of them."""
        if not self.speculates:
            return 0.0, []
        sampling, self.lookup = self.request.sampling, self.lookup or PromptLookup()
        self.lookup.extend(self.tokens(self.lookup.num_tokens, self.num_known))
        # A token is drawn after the last draft too. And whatever followed a stop token would be for nothing.
        guess = self.lookup.propose()[: sampling.max_tokens - len(self.output_ids) - 1]
        stops = (i for i, token_id in enumerate(guess) if token_id in sampling.stop_token_ids)
        guess = guess[: next(stops, None)]
        if guess and self.matcher is not None:
            guess = guess[: self.matcher.count_viable(guess)]
        return self.lookup.probability, guess

    def ends_with(self, token_ids: Sequence[int]) -> FinishReason | None:
        """Why it ends with these tokens, which are the last of its output, if it does.

        Raises:
            EngineFaultError: they are not of its grammar.
        """
        sampling = self.request.sampling
        if token_ids and token_ids[-1] in sampling.stop_token_ids:
            return FinishReason.STOP
        if self.matcher is not None:
            self.matcher.take(token_ids)
            if self.matcher.is_complete:
                return FinishReason.STOP
        return FinishReason.LENGTH if len(self.output_ids) >= sampling.max_tokens else None

    def usage(self) -> Usage:
        assert self.scheduled_s is not None
        assert self.first_token_s is not None
        return Usage(
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.output_ids),
            cached_tokens=self.num_cached,
            queue_s=self.scheduled_s - self.arrived_s,
            prefill_s=self.first_token_s - self.scheduled_s,
        )

    @property
    def scores_prompt(self) -> bool:
        return self.request.sampling.prompt_logprobs is not None and not self.sent_any


class Scheduler:
    """Waiting and running sequences, and their cache blocks.

    Args:
        config: limits of a step and of the queue.
        pool: the cache's blocks; the scheduler is their only user.
        speculation: says how much to draft.
    """

    def __init__(self, config: EngineConfig, pool: BlockPool, speculation: SpeculationController) -> None:
        self._config = config
        self._pool = pool
        self._speculation = speculation
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []
        self._by_request: dict[str, _Sequence] = {}
        self._next_id = 0
        self.prefix_queries_tokens = 0
        self.prefix_hits_tokens = 0
        self.num_preemptions = 0
        self.num_draft_tokens = 0
        self.num_accepted_tokens = 0

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, request: Request, matcher: TokenMatcher | None = None) -> None:
        """Queue a request.

        Args:
            matcher: of its grammar, where it has one, after what was generated before.

        Raises:
            OverloadedError: the queue is full.
        """
        if len(self._waiting) >= self._config.max_num_queued:
            raise OverloadedError(f"the engine's queue is full ({self._config.max_num_queued} requests)")
        sequence = _Sequence(self._next_id, request, matcher)
        self._next_id += 1
        self._by_request[request.id] = sequence
        self._waiting.append(sequence)

    def cancel(self, request_id: str) -> None:
        """Forget a request and free what it held; unknown ids are those that finished meanwhile."""
        sequence = self._by_request.get(request_id)
        if sequence is not None:
            self._remove(sequence)

    def schedule(self) -> BatchPlan | None:
        """Decide the next step, or None when nothing waits. Takes the blocks that the step writes to."""
        steps: dict[int, SequenceStep] = {}
        budget, preemptions_before = self._config.max_num_batched_tokens, self.num_preemptions
        for sequence in sorted(self._running, key=lambda s: s.num_to_compute > 1):
            count = min(sequence.num_to_compute, budget)
            if count == 0 or sequence not in self._running:
                continue
            if self._make_room(sequence, count, steps):
                steps[sequence.id] = self._step(sequence, count)
                budget -= count
        preempted = self.num_preemptions > preemptions_before
        while self._waiting and budget > 0 and not preempted and self.num_running < self._config.max_num_seqs:
            count = self._admit(self._waiting[0], budget)
            if count == 0:
                break
            sequence = self._waiting.popleft()
            sequence.scheduled_s = sequence.scheduled_s or time.monotonic()
            self._running.append(sequence)
            steps[sequence.id] = self._step(sequence, count)
            budget -= count
        self._add_drafts(steps)
        return BatchPlan(sequences=tuple(steps.values())) if steps else None

    def update(self, plan: BatchPlan, results: Mapping[int, StepResult]) -> list[TokenChunk | RequestFailed]:
        """Take over what a step computed; returns what its requests get to see, finished ones included."""
        outputs: list[TokenChunk | RequestFailed] = []
        running = {sequence.id: sequence for sequence in self._running}
        for step in plan.sequences:
            sequence, result = running[step.sequence_id], results[step.sequence_id]
            if result.fault is not None:
                outputs.append(self._fail(sequence, result.fault, invalid=result.is_invalid))
                continue
            if step.num_drafts and not result.token_ids:
                sequence.speculates = False
                continue
            is_due = sequence.num_to_compute == len(step.token_ids) - step.num_drafts
            num_accepted = len(result.token_ids) - 1 if step.num_drafts else 0
            self.num_draft_tokens += step.num_drafts
            self.num_accepted_tokens += num_accepted
            sequence.num_computed += len(step.token_ids) - step.num_drafts + num_accepted
            sequence.prompt_logprobs += result.prompt_logprobs
            sequence.hidden_sums = added(sequence.hidden_sums, result.hidden_sums)
            sequence.output_ids += result.token_ids
            self._publish_full_blocks(sequence)
            if is_due:
                try:
                    outputs.append(self._advance(sequence, result))
                except EngineFaultError as error:
                    outputs.append(self._fail(sequence, str(error)))
        return outputs

    def fail(self, plan: BatchPlan, message: str) -> list[TokenChunk | RequestFailed]:
        """Drop every sequence of a step that could not be computed."""
        return self.update(plan, {step.sequence_id: StepResult(fault=message) for step in plan.sequences})

    def _advance(self, sequence: _Sequence, result: StepResult) -> TokenChunk:
        """All known tokens were computed, and more drawn: see whether the sequence ends."""
        sequence.first_token_s = sequence.first_token_s or time.monotonic()
        finish = sequence.ends_with(result.token_ids)
        scores = sequence.prompt_logprobs if sequence.scores_prompt else None
        vector = embedding(sequence.hidden_sums) if sequence.request.embed else None
        says_usage = finish is not None or not sequence.sent_any
        sequence.sent_any, sequence.prompt_logprobs = True, []
        if finish is not None:
            self._remove(sequence)
        return TokenChunk(
            request_id=sequence.request.id,
            token_ids=list(result.token_ids),
            logprobs=list(result.logprobs),
            prompt_logprobs=scores,
            embedding=vector,
            finish_reason=finish,
            usage=sequence.usage() if says_usage else None,
        )

    def _fail(self, sequence: _Sequence, message: str, *, invalid: bool = False) -> RequestFailed:
        self._pool.forget(sequence.blocks)
        self._remove(sequence)
        return RequestFailed(request_id=sequence.request.id, message=message, invalid=invalid)

    def _add_drafts(self, steps: dict[int, SequenceStep]) -> None:
        """Let the steps of a batch that only decodes try drafts, where that pays. Preempts nobody for it."""
        limit = min(self._config.max_num_batched_tokens, MAX_STEP_TOKENS)
        decodes = all(s.samples and len(s.token_ids) == 1 and not s.scores_prompt for s in steps.values())
        if not self._config.speculation or not decodes or len(steps) >= limit:
            return
        sequences = [sequence for sequence in self._running if sequence.id in steps]
        drafts = [sequence.draft() for sequence in sequences]
        counts = self._speculation.choose([(chance, len(draft)) for chance, draft in drafts], limit)
        for sequence, (_, draft), count in zip(sequences, drafts, counts, strict=True):
            needed = max(0, self._num_blocks(sequence.num_known + count) - len(sequence.blocks))
            if needed + self.num_running > self._pool.num_free:
                # The others' next tokens come first: it gets no more than what fits into the blocks it has.
                needed = 0
                count = min(count, len(sequence.blocks) * self._config.block_tokens - sequence.num_known)
            sequence.blocks += self._pool.allocate(needed)
            if count > 0:
                steps[sequence.id] = self._step(sequence, 1, draft[:count])

    def _step(self, sequence: _Sequence, count: int, draft: Sequence[int] = ()) -> SequenceStep:
        start, sampling = sequence.num_computed, sequence.request.sampling
        return SequenceStep(
            sequence_id=sequence.id,
            token_ids=(*sequence.tokens(start, start + count), *draft),
            num_drafts=len(draft),
            start=start,
            block_table=tuple(sequence.blocks),
            samples=count == sequence.num_to_compute and sampling.max_tokens > 0,
            sampling=sampling,
            seed=sequence.seed,
            history=(sequence.prompt_ids, sequence.output_ids),
            scores_prompt=sequence.scores_prompt,
            embeds=sequence.request.embed,
            matcher=sequence.matcher,
        )

    def _admit(self, sequence: _Sequence, budget: int) -> int:
        """Give a waiting sequence its known prefix and the blocks of its first chunk; 0 if there are too few."""
        size = self._config.block_tokens
        # At least the last known token is computed anew: its logits are needed. Scoring and embedding need all.
        reusable = self._config.prefix_caching and not (sequence.scores_prompt or sequence.request.embed)
        num_reusable = (sequence.num_known - 1) // size if reusable else 0
        prefix = self._pool.find_prefix(sequence.block_names(num_reusable, size))
        num_found = len(prefix) * size
        count = min(sequence.num_known - num_found, budget)
        needed = self._num_blocks(num_found + count) - len(prefix)
        if needed + self._pool.num_unused(prefix) > self._pool.num_free:
            return 0
        self._pool.refer(prefix)
        sequence.blocks = prefix + self._pool.allocate(needed)
        sequence.num_computed = num_found
        sequence.num_published = len(prefix)
        if not sequence.sent_any and not sequence.request.embed:
            sequence.num_cached = num_found
            self.prefix_queries_tokens += sequence.num_known
            self.prefix_hits_tokens += num_found
        return count

    def _make_room(self, sequence: _Sequence, count: int, steps: dict[int, SequenceStep]) -> bool:
        """Give a running sequence the blocks for `count` more tokens, preempting the youngest if need be."""
        needed = max(0, self._num_blocks(sequence.num_computed + count) - len(sequence.blocks))
        while needed > self._pool.num_free:
            youngest = self._running[-1]
            self._preempt(youngest)
            steps.pop(youngest.id, None)
            if youngest is sequence:
                return False
        sequence.blocks += self._pool.allocate(needed)
        return True

    def _preempt(self, sequence: _Sequence) -> None:
        """Back to the head of the queue; recomputed later, mostly from its own still cached blocks."""
        self._running.remove(sequence)
        self._release(sequence)
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _remove(self, sequence: _Sequence) -> None:
        (self._running if sequence in self._running else self._waiting).remove(sequence)
        del self._by_request[sequence.request.id]
        self._release(sequence)

    def _release(self, sequence: _Sequence) -> None:
        self._pool.free(sequence.blocks)
        sequence.blocks, sequence.num_published, sequence.num_computed = [], 0, 0
        sequence.hidden_sums = ()
        if sequence.scores_prompt:
            sequence.prompt_logprobs = []

    def _publish_full_blocks(self, sequence: _Sequence) -> None:
        if sequence.request.embed:
            return  # many texts come once each, and would drive out what comes again
        size = self._config.block_tokens
        num_full = sequence.num_computed // size
        if self._config.prefix_caching and num_full > sequence.num_published:
            names = sequence.block_names(num_full, size)
            for index in range(sequence.num_published, num_full):
                self._pool.publish(sequence.blocks[index], names[index])
            sequence.num_published = num_full

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._config.block_tokens)
