"""The engine: schedule, execute, update."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import torch

from localmoe.core.errors import InvalidRequestError, LocalMoEError, OverloadedError
from localmoe.core.events import EngineState
from localmoe.core.inspection import Inspection
from localmoe.core.request import Request, RequestFailed, TokenChunk
from localmoe.engine.block_pool import BlockPool
from localmoe.engine.config import EngineConfig, kv_bytes_per_token
from localmoe.engine.executor import Executor, forward_with
from localmoe.engine.grammars import Grammars
from localmoe.engine.insight import Insight
from localmoe.engine.kv_cache import KVCache
from localmoe.engine.scheduler import Scheduler
from localmoe.engine.speculation import SpeculationController
from localmoe.kernels.base import Kernels
from localmoe.models.decoder import Decoder

logger = logging.getLogger(__name__)


class Engine:
    """One model being served, without any I/O: requests in, chunks out.

    Args:
        model: the name it is served under.
        decoder: with its weights loaded.
        kernels: draw tokens.
        config: resolved, that is with a `kv_cache_bytes` and a `kv_cache_dtype`.
        insight: into the decoder's experts.
        relieve: told how much memory is left; gives some back if that is too little.
    """

    def __init__(
        self,
        model: str,
        decoder: Decoder,
        kernels: Kernels,
        config: EngineConfig,
        insight: Insight,
        relieve: Callable[[int], None],
    ) -> None:
        assert config.kv_cache_bytes is not None, "resolved against the model's shape"
        self._model = model
        self._shape = shape = decoder.shape
        self._max_context_tokens = config.max_context_tokens or shape.max_context_tokens
        num_blocks = config.kv_cache_bytes // (
            config.block_tokens * kv_bytes_per_token(shape, config.kv_cache_dtype)
        )
        compiles = kernels.device.type == "cuda"
        self.warm_up_tokens = min(config.max_num_batched_tokens, self._max_context_tokens - 2) if compiles else 2
        """Of a prompt after which no other of usual sizes waits for kernels to be compiled."""
        dtype = torch.bfloat16 if config.kv_cache_dtype == "bf16" else torch.float32
        self._pool = BlockPool(num_blocks)
        self._speculation = SpeculationController()
        self._scheduler = Scheduler(config, self._pool, self._speculation)
        self._insight = insight
        self.relieve = relieve
        self._max_num_queued = config.max_num_queued
        self._grammars = Grammars(shape.vocab_size, kernels.device)
        cache = KVCache(shape, num_blocks, config.block_tokens, dtype, kernels.device)
        forward = forward_with(decoder, cache, insight.experts, max_num_seqs=config.max_num_seqs)
        self._executor = Executor(decoder, cache, kernels, forward)

    @property
    def has_work(self) -> bool:
        """Whether a request is waiting or running."""
        return self._scheduler.has_work or self._grammars.num_pending > 0

    def take_grammars(self, tokenizer_path: Path | None) -> None:
        """Take requests with grammars, or take none.

        Args:
            tokenizer_path: directory of the model's tokenizer, which is read when the first of them comes.
        """
        self._grammars.tokenizer_path = tokenizer_path

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            OverloadedError: the queue is full.
            InvalidRequestError: token ids that the model does not have, or more of them than the cache can hold, or a
                grammar where there is no tokenizer, or an embedding and tokens.
        """
        sampling, prompt_ids = request.sampling, request.prompt_ids
        # Checked at this door whatever the gateway checked: one bad id would fail everybody in its step.
        ids = [*prompt_ids, *request.resumed_ids, *sampling.logit_bias]
        if sampling.grammar is not None:
            ids += sampling.stop_token_ids
        if not prompt_ids or min(ids) < 0 or max(ids) >= self._shape.vocab_size:
            raise InvalidRequestError(
                f"token ids must be from 0 to {self._shape.vocab_size - 1}, and at least one"
            )
        if len(prompt_ids) + sampling.max_tokens > self._max_context_tokens:
            raise InvalidRequestError(
                f"{len(prompt_ids)} prompt tokens and {sampling.max_tokens} to generate exceed the engine's context "
                f"of {self._max_context_tokens}"
            )
        if len(request.resumed_ids) >= max(1, sampling.max_tokens):
            raise InvalidRequestError(
                f"{len(request.resumed_ids)} tokens were generated already, of at most {sampling.max_tokens}"
            )
        if request.embed and sampling.max_tokens > 0:
            raise InvalidRequestError("an embedding is asked for, and tokens: the engine gives one of the two")
        if sampling.grammar is None:
            self._scheduler.add(request)
        elif self._scheduler.num_waiting + self._grammars.num_pending >= self._max_num_queued:
            raise OverloadedError(f"the engine's queue is full ({self._max_num_queued} requests)")
        else:
            self._grammars.compile(request)

    def cancel(self, request_id: str) -> None:
        """Forget a request; unknown ids are those that finished meanwhile."""
        self._grammars.cancel(request_id)
        self._scheduler.cancel(request_id)

    def step(self) -> list[TokenChunk | RequestFailed]:
        """Bring every scheduled sequence one step forward; empty when nothing is to be done or seen."""
        outputs: list[TokenChunk | RequestFailed] = [*self._grammars.hand_over(self._scheduler.add)]
        plan = self._scheduler.schedule()
        if plan is None:
            self._grammars.wait()
            return outputs
        self._insight.experts.begin(plan)
        started_s = time.perf_counter()
        try:
            results = self._executor.execute(plan, self._grammars.begin_masks(plan))
        except Exception as error:
            # Whatever went wrong (memory, a damaged weight), it must cost this step's requests only.
            is_foreseen = isinstance(error, LocalMoEError)
            logger.error("step of %d tokens failed: %s", plan.num_tokens, error, exc_info=not is_foreseen)
            self._executor.ensure_device()  # but a GPU that is lost costs the process, which is replaced
            return outputs + self._scheduler.fail(plan, f"the engine failed: {error}")
        self._speculation.observe(plan, time.perf_counter() - started_s)
        return outputs + self._scheduler.update(plan, results)

    def forget(self) -> None:
        """Begin to count heat and times anew."""
        self._insight.experts.forget()

    def record_routing(self, path: Path) -> None:
        """From now on write down in a file which experts are chosen; see `engine/routing_trace.py`."""
        self._insight.record_routing(self._model, path)

    def rest(self) -> None:
        """No step follows for a while."""
        self._insight.experts.rest()

    def inspect(self) -> Inspection:
        """Its experts and memory in full, as of now."""
        return self._insight.inspect(self.state())

    def state(self) -> EngineState:
        """Gauges and totals as of now."""
        scheduler, pool = self._scheduler, self._pool
        num_layer_runs, layers_s = self._insight.experts.totals()
        return EngineState(
            model=self._model,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting + self._grammars.num_pending,
            kv_blocks_used=pool.num_blocks - pool.num_free,
            kv_blocks_total=pool.num_blocks,
            prefix_cache_queries=scheduler.prefix_queries_tokens,
            prefix_cache_hits=scheduler.prefix_hits_tokens,
            num_preemptions=scheduler.num_preemptions,
            num_draft_tokens=scheduler.num_draft_tokens,
            num_accepted_tokens=scheduler.num_accepted_tokens,
            num_layer_runs=num_layer_runs,
            layers_s=layers_s,
            tiers=self._executor.tier_state(),
        )
