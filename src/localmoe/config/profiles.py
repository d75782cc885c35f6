"""Profiles: sets of defaults, for whatever the user does not set. None of them changes an answer."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any

MIB = 1 << 20


class Profile(StrEnum):
    """What a server is for."""

    AUTO = "auto"
    """The defaults of `EngineConfig`; what can be measured is measured."""
    LOW_LATENCY = "low_latency"
    """One person, or a few: an answer's speed counts."""
    BALANCED = "balanced"
    """A team: many answers at once, none of them slow."""
    HIGH_THROUGHPUT = "high_throughput"
    """Batch work: all answers together count, a single one may wait."""
    SMALL_MEMORY = "small_memory"
    """A machine with little memory, as at the edge, most of which experts should get."""


PROFILES: Mapping[Profile, Mapping[str, Any]] = {
    Profile.AUTO: {},
    Profile.LOW_LATENCY: {
        "engine": {
            # Every sequence more in a step has its own experts read, and all wait for them.
            "max_num_seqs": 4,
            # Four sequences fill little of it; experts get the rest, and what is kept need not be read.
            "kv_cache_share": 0.15,
            # Not smaller than elsewhere: each chunk of a prompt reads nearly every expert, so more chunks would
            # take the first token longer.
            "max_num_batched_tokens": 512,
            # Pays most with few sequences, whose steps have room for guesses.
            "speculation": True,
        }
    },
    Profile.BALANCED: {
        "engine": {
            # Half of the default: the slowest answer of a full server waits for half as many others' experts.
            "max_num_seqs": 32,
            "kv_cache_share": 0.25,
            # A prompt of 1000 tokens reads the experts once, not twice; those being decoded wait twice as long.
            "max_num_batched_tokens": 1024,
            "speculation": True,
        }
    },
    Profile.HIGH_THROUGHPUT: {
        "engine": {
            # An expert is read once for all who use it in a step. Not more: logits take 8 bytes of workspace for each
            # sequence and entry of the vocabulary.
            "max_num_seqs": 128,
            # So many sequences need a cache; one that is preempted is computed again.
            "kv_cache_share": 0.5,
            # Prompts pay for the experts' bytes once for so many tokens.
            "max_num_batched_tokens": 2048,
            "max_num_queued": 4000,
            # Large batches leave little to gain, and looking guesses up takes memory and time for every sequence.
            "speculation": False,
        }
    },
    Profile.SMALL_MEMORY: {
        "engine": {
            "max_num_seqs": 2,
            # The cache must hold one whole context, and a step's workspace grows with its tokens: some 100 and 200 kB
            # a token, which experts do not get.
            "max_context_tokens": 2048,
            "max_num_batched_tokens": 128,
            "kv_cache_share": 0.1,
            "kv_cache_dtype": "bf16",
            # Waiting requests take memory too.
            "max_num_queued": 32,
            "speculation": True,
            # Where nothing can be swapped out, more is left alone: to be killed costs more than a few experts.
            "tiers": {"reserve_bytes": 256 * MIB},
        }
    },
}
