"""The engine: schedule, execute, update."""

import logging

from localmoe.core.events import EngineState
from localmoe.core.request import RequestFailed, TokenChunk
from localmoe.engine.block_pool import BlockPool
from localmoe.engine.executor import Executor
from localmoe.engine.scheduler import Scheduler

logger = logging.getLogger(__name__)


class Engine:
    """One model being served, without any I/O: requests in, chunks out."""

    def __init__(self, model: str, scheduler: Scheduler, executor: Executor, pool: BlockPool) -> None:
        self._model = model
        self.scheduler = scheduler
        self._executor = executor
        self._pool = pool

    def step(self) -> list[TokenChunk | RequestFailed]:
        """Bring every scheduled sequence one step forward; empty when nothing is to be done or seen."""
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        try:
            results = self._executor.execute(plan)
        except Exception as error:
            # Whatever went wrong (memory, a damaged weight), it must cost this step's requests only.
            logger.exception("step of %d tokens failed", plan.num_tokens)
            return self.scheduler.fail(plan, f"the engine failed: {error}")
        return self.scheduler.update(plan, results)

    def state(self) -> EngineState:
        """Gauges and totals as of now."""
        scheduler, pool = self.scheduler, self._pool
        return EngineState(
            model=self._model,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_blocks_used=pool.num_blocks - pool.num_free,
            kv_blocks_total=pool.num_blocks,
            prefix_cache_queries=scheduler.prefix_queries_tokens,
            prefix_cache_hits=scheduler.prefix_hits_tokens,
            num_preemptions=scheduler.num_preemptions,
        )
