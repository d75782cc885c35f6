"""What attention in parts takes; known without Triton, to whoever plans memory."""

from localmoe.core.model import ModelShape

PIECE_TOKENS = 512
"""A sequence's keys are summed up in pieces of this many positions, whatever the batch."""
MAX_PARTS_SIZE = 64 << 20
"""Float32 numbers of pieces that are computed side by side: 256 MiB."""


def parts_bytes(shape: ModelShape, num_tokens: int, context_tokens: int) -> int:
    """At most, in a step of so many tokens of sequences no longer than a context."""
    num_pieces = -(-context_tokens // PIECE_TOKENS)
    if num_pieces == 1:
        return 0
    return 4 * min(MAX_PARTS_SIZE, num_pieces * num_tokens * shape.num_heads * (shape.head_dim + 2))
