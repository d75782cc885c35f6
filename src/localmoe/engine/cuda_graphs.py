"""Decode steps as CUDA graphs: a launch of some hundred kernels costs the host more than the GPU takes for one token.

A graph runs the same kernels on the same memory, so a step is put into buffers of a size with room for it: a number
of sequences and a number of cache blocks of the longest, each the next power of two. `StaticStep` says what becomes
of the rest. A size is captured when it is first needed, after every kernel has run once, so that Triton has compiled
it. Steps with more than one token of a sequence run as they are, and so do those that there is no memory to capture.

Results are the same bits as without graphs: rows and pieces of the context that are not there change nothing.
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from localmoe.core.events import TierState
from localmoe.core.protocols import ExpertExecutor, Routed
from localmoe.engine.kv_cache import KVCache
from localmoe.engine.watch import Watch
from localmoe.kernels.base import PagedStep
from localmoe.kernels.triton.sizes import PIECE_TOKENS
from localmoe.kernels.triton.static_step import StaticStep
from localmoe.models.decoder import Decoder

logger = logging.getLogger(__name__)

Capture = Callable[[Callable[[], None]], Callable[[], None]]
"""Takes what launches kernels; gives what launches them again."""


class CudaCapture:
    """Captures graphs that share memory, since one runs after the other."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, launch: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            launch()
        return graph.replay


class DecodeGraphs:
    """A decoder's forward pass, decode steps captured.

    Args:
        decoder: computes everything on one device, and waits for nothing in between.
        watch: on the decoder's experts; told of what is replayed.
        capture: `CudaCapture`; in tests, something that calls again.
        max_num_seqs: most sequences in one step.
    """

    def __init__(
        self, decoder: Decoder, cache: KVCache, watch: Watch, capture: Capture, *, max_num_seqs: int
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._watch = watch
        self._capture = capture
        self._max_num_seqs = max_num_seqs
        self._graphs: dict[tuple[int, int], tuple[_DecodeStep, Callable[[], None]] | None] = {}
        """By size; None: there was no memory to capture it."""

    def __call__(self, token_ids_T: Tensor, step: PagedStep) -> Tensor:
        """Last layer's output [T, D] float32, valid until the next call."""
        num_seqs, table_blocks = step.tables_SN.shape
        if len(token_ids_T) > num_seqs or self._watch.needs_each_layer:
            return self._decoder.forward(token_ids_T, self._cache, step)
        num_rows = min(_power_of_2(num_seqs), self._max_num_seqs)
        num_blocks = max(_power_of_2(table_blocks), PIECE_TOKENS // self._cache.block_tokens)
        size = num_rows, num_blocks
        if size not in self._graphs:
            self._graphs[size] = self._captured(token_ids_T, step, *size)
        captured = self._graphs[size]
        if captured is None:
            return self._decoder.forward(token_ids_T, self._cache, step)
        static, replay = captured
        static.step.fill(token_ids_T.numpy(), step)
        replay()
        self._watch.replayed(static.ids_LSK[:, :num_seqs].clone())
        return static.hidden_SD[:num_seqs]

    def _captured(
        self, token_ids_T: Tensor, step: PagedStep, num_rows: int, num_blocks: int
    ) -> "tuple[_DecodeStep, Callable[[], None]] | None":
        """A size, captured with the first step of it; None: memory does not suffice."""
        try:
            static = _DecodeStep(self._decoder, self._cache, self._watch, num_rows, num_blocks)
            static.step.fill(token_ids_T.numpy(), step)
            static.launch()  # what is compiled or allocated at first use cannot be while a graph is captured
            return static, self._capture(static.launch)
        except torch.OutOfMemoryError as error:
            logger.warning(
                "decode steps of %d sequences and %d blocks run without a graph: %s", num_rows, num_blocks, error
            )
            return None


class _DecodeStep:
    """Steps of one size: where they come from and go to."""

    hidden_SD: Tensor
    ids_LSK: Tensor
    """Experts that were chosen."""

    def __init__(self, decoder: Decoder, cache: KVCache, watch: Watch, num_seqs: int, table_blocks: int) -> None:
        shape = decoder.shape
        self._decoder = decoder
        self._cache = cache
        self._watch = watch
        self.step = StaticStep.allocate(
            num_seqs=num_seqs,
            table_blocks=table_blocks,
            head_dim=shape.head_dim,
            heads_per_group=shape.num_heads // shape.num_kv_heads,
            block_tokens=cache.block_tokens,
            device=decoder.device,
        )

    def launch(self) -> None:
        """Compute what is in the buffers."""
        decoder, experts = self._decoder, self._decoder.experts
        decoder.experts = noted = _NotedExperts(self._watch.watched)
        try:
            self.hidden_SD = decoder.forward(self.step.device_token_ids_S, self._cache, self.step)
        finally:
            decoder.experts = experts
        self.ids_LSK = torch.stack(noted.ids)


class _NotedExperts:
    """Experts whose choices are noted down."""

    def __init__(self, experts: ExpertExecutor[Tensor]) -> None:
        self._experts = experts
        self.ids: list[Tensor] = []
        """[S, K] of each layer so far."""

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        self._experts.begin_step(is_prompt_T)

    def state(self) -> TierState | None:
        return self._experts.state()

    def __call__(self, routed: Routed[Tensor], x_TD: Tensor) -> None:
        self.ids.append(routed.ids_TK)
        self._experts(routed, x_TD)


def _power_of_2(number: int) -> int:
    """The next that is no less."""
    return 1 << (number - 1).bit_length()
