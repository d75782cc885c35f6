"""Settings of the native engine."""

from dataclasses import dataclass, replace

from localmoe.core.errors import EngineStartError
from localmoe.core.model import ModelShape

_TYPICAL_TOKENS_PER_SEQUENCE = 2048
"""What an automatic cache sets aside for each sequence that may run at once."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How one native engine serves. `resolve` settles what is left automatic."""

    num_threads: int | None = None
    """Compute threads; None: one per core."""
    max_num_seqs: int = 64
    """Most sequences in one step."""
    max_num_batched_tokens: int = 512
    """Most tokens in one step; longer prompts are computed in chunks of at most this many."""
    max_num_queued: int = 1000
    """Requests that may wait beyond those running; more are refused."""
    block_tokens: int = 16
    """Tokens per cache block, the grain of prefix reuse."""
    kv_cache_bytes: int | None = None
    """Keys and values of all sequences together; None: a quarter of the free memory, within reason."""
    prefix_caching: bool = True
    """Reuse the keys and values of prompts that begin alike."""

    def resolve(self, shape: ModelShape, free_bytes: int) -> "EngineConfig":
        """Replace an automatic `kv_cache_bytes` by a number that fits this model and machine.

        Args:
            free_bytes: memory that is left once the weights are loaded.

        Raises:
            EngineStartError: the cache would not hold one sequence of the model's full context.
        """
        block_bytes = self.block_tokens * kv_bytes_per_token(shape)
        least_bytes = -(-shape.max_context_tokens // self.block_tokens) * block_bytes
        if self.kv_cache_bytes is None:
            if free_bytes < least_bytes:
                raise EngineStartError(
                    f"not enough memory: {max(free_bytes, 0)} bytes would be free beside the weights, but one "
                    f"sequence of this model's {shape.max_context_tokens} tokens needs {least_bytes}"
                )
            useful_bytes = self.max_num_seqs * _TYPICAL_TOKENS_PER_SEQUENCE // self.block_tokens * block_bytes
            return replace(self, kv_cache_bytes=max(least_bytes, min(useful_bytes, free_bytes // 4)))
        if self.kv_cache_bytes < least_bytes:
            raise EngineStartError(
                f"kv_cache_bytes is {self.kv_cache_bytes}, but one sequence of this model's "
                f"{shape.max_context_tokens} tokens needs {least_bytes}"
            )
        return self


def kv_bytes_per_token(shape: ModelShape) -> int:
    """Keys and values of one token over all layers, in float32."""
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4


def weights_bytes(shape: ModelShape) -> int:
    """All weights in float32; norms and routers are too small to count."""
    attention = 2 * shape.hidden_size * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    experts = 3 * shape.num_experts * shape.hidden_size * shape.expert_size
    embeddings = shape.vocab_size * shape.hidden_size * (1 if shape.tie_embeddings else 2)
    return 4 * (shape.num_layers * (attention + experts) + embeddings)
