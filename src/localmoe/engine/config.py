"""Settings of the native engine."""

import re
from dataclasses import dataclass, field, replace
from typing import Literal

from localmoe.core.errors import EngineStartError
from localmoe.core.model import ModelShape, WeightFormat
from localmoe.tiers.config import MAX_TIME_S, TiersConfig

MAX_THREADS = 1024
"""Most compute threads."""

_TYPICAL_TOKENS_PER_SEQUENCE = 2048
"""What an automatic cache sets aside for each sequence that may run at once."""

_LANES = 16
"""Tokens that attention kernels take side by side."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How one native engine serves. `resolve` settles what is left automatic but `num_threads`."""

    num_threads: int | None = None
    """Compute threads; None: one per physical core that the process may use."""
    pin_threads: bool = False
    """Keep each compute thread on one processor; pays where the engine has its processors to itself."""
    device: str = "auto"
    """What computes: `cpu`; `cuda` or `cuda:N`, a GPU of compute capability 8.0 or higher; `auto`: the first such
    GPU, or the processor where there is none."""
    cpu_level: str = "auto"
    """Instructions to compute with: `avx2`, `avx_vnni`, `avx512_vnni`, `amx`, or `reference` for plain torch;
    `auto`: the best that this machine runs."""
    max_num_seqs: int = 64
    """Most sequences in one step."""
    max_num_batched_tokens: int = 512
    """Most tokens in one step; longer prompts are computed in chunks of at most this many."""
    max_num_queued: int = 1000
    """Requests that may wait beyond those running; more are refused."""
    block_tokens: int = 16
    """Tokens per cache block, the grain of prefix reuse; a multiple of 16."""
    max_context_tokens: int | None = None
    """Longest sequence, prompt and answer together; None, or more than that: what the model was made for."""
    kv_cache_bytes: int | None = None
    """Keys and values of all sequences together; None: `kv_cache_share` of the free memory, within reason."""
    kv_cache_share: float = 0.25
    """Of the free memory, at most this much for an automatic `kv_cache_bytes`; above 0, at most 1. What the cache
    does not take is there for experts."""
    kv_cache_dtype: Literal["auto", "bf16", "f32"] = "auto"
    """`auto`: f32 for a model stored in f32, else bf16."""
    prefix_caching: bool = True
    """Reuse the keys and values of prompts that begin alike."""
    speculation: bool = True
    """Guess tokens by prompt lookup and check several in one step, where measurements say that it pays."""
    expert_threshold: float = 0.0
    """Lossy: answers change. A token skips those of its chosen experts whose share of the chosen experts' router
    weights is below this, but never its first; from 0, which skips none, to 1."""
    adaptive_expert_threshold: bool = False
    """Lossy, and answers then depend on timing, so that not even a seed repeats them: while steps wait for the disk,
    raise the threshold, at most to half of an even share. See `engine/expert_threshold.py`."""
    tiers: TiersConfig = field(default_factory=TiersConfig)
    routing_trace: str | None = None
    """File to write down in which experts the router chooses for each token, see `engine/routing_trace.py`; no
    tokens or texts. None: do not."""
    start_timeout_s: float = 600.0
    """An engine that is not ready this long after its start has failed to start."""
    hang_timeout_s: float = 120.0
    """An engine that has requests but finishes no step for this long is taken for hung, killed and replaced."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "expert_threshold" or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise ValueError(f"num_threads is {self.num_threads}; it must be from 1 to {MAX_THREADS}")
        for name in ("start_timeout_s", "hang_timeout_s"):
            if vars(self)[name] > MAX_TIME_S:
                raise ValueError(f"{name} is {vars(self)[name]}; it must be at most {MAX_TIME_S}")
        if self.routing_trace is not None and not _is_utf8(self.routing_trace):
            raise ValueError(f"routing_trace is {self.routing_trace!r}; it must be UTF-8")
        if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", self.device, re.ASCII):
            raise ValueError(f"device is {self.device!r}; it must be auto, cpu, cuda, or cuda:0 and so on")
        if not 0 <= self.expert_threshold <= 1:
            raise ValueError(f"expert_threshold is {self.expert_threshold}; it must be from 0 to 1")
        if self.kv_cache_share > 1:
            raise ValueError(f"kv_cache_share is {self.kv_cache_share}; it must be at most 1")
        if self.block_tokens % _LANES:
            raise ValueError(f"block_tokens is {self.block_tokens}; it must be a multiple of {_LANES}")

    def resolve(self, shape: ModelShape, weights: WeightFormat, free_bytes: int) -> "EngineConfig":
        """Settle `max_context_tokens`, `kv_cache_bytes` and `kv_cache_dtype` for this model and machine.

        Args:
            weights: what the model is stored in.
            free_bytes: memory that is left once the weights are loaded.

        Raises:
            EngineStartError: the cache would not hold one sequence of the model's full context.
        """
        dtype = self.kv_cache_dtype
        if dtype == "auto":
            dtype = "f32" if weights is WeightFormat.F32 else "bf16"
        context_tokens = min(self.max_context_tokens or shape.max_context_tokens, shape.max_context_tokens)
        block_bytes = self.block_tokens * kv_bytes_per_token(shape, dtype)
        least_bytes = -(-context_tokens // self.block_tokens) * block_bytes
        cache_bytes = self.kv_cache_bytes
        if cache_bytes is None:
            if free_bytes < least_bytes:
                if free_bytes <= 0:
                    raise EngineStartError(
                        f"not enough memory: {-free_bytes} bytes are missing for the weights alone"
                    )
                raise EngineStartError(
                    f"not enough memory: {free_bytes} bytes would be free beside the weights, but one "
                    f"sequence of {context_tokens} tokens needs {least_bytes}; lower max_context_tokens"
                )
            useful_bytes = self.max_num_seqs * _TYPICAL_TOKENS_PER_SEQUENCE // self.block_tokens * block_bytes
            cache_bytes = max(least_bytes, min(useful_bytes, int(free_bytes * self.kv_cache_share)))
        elif cache_bytes < least_bytes:
            raise EngineStartError(
                f"kv_cache_bytes is {cache_bytes}, but one sequence of "
                f"{context_tokens} tokens needs {least_bytes}; raise it, or lower max_context_tokens"
            )
        return replace(self, max_context_tokens=context_tokens, kv_cache_bytes=cache_bytes, kv_cache_dtype=dtype)


def _is_utf8(text: str) -> bool:
    """False of a path whose bytes are not, as the command line gives it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kv_bytes_per_token(shape: ModelShape, dtype: str) -> int:
    """Keys and values of one token over all layers; `dtype` as in `EngineConfig`."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * {"bf16": 2, "f32": 4}[dtype]


def num_weights(shape: ModelShape) -> int:
    """Weights of the whole model; norms and routers are too few to count."""
    attention = 2 * shape.hidden_size * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    experts = 3 * shape.num_experts * shape.hidden_size * shape.expert_size
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)
    return shape.num_layers * (attention + experts) + embeddings
