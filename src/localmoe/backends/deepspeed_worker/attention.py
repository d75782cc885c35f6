"""Attention over the sequences of a step, which lie one after the other in a single row of tokens.

transformers lets a model call an attention function of ours, and makes no masks for it. So a forward pass takes
chunks of prompts and single tokens of any sequences side by side, without padding, and each sequence's keys and
values lie in tensors of its own: nothing is merged or split when one comes or goes.

Shape suffixes: H heads of queries, G heads of keys and values, T tokens of the step, N tokens of a sequence, E size
of a head.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from localmoe.core.errors import EngineStartError

PAGE_TOKENS = 256
"""By how many tokens the room of a sequence grows."""

_UNSUPPORTED = ("softcap", "s_aux", "sinks", "position_bias")
"""Arguments by which some models ask for more than scaled dot-product attention."""


def num_pages(num_tokens: int) -> int:
    """Pages that hold so many tokens."""
    return -(-num_tokens // PAGE_TOKENS)


class SequenceCache:
    """Keys and values of all sequences and layers. Made for one model, whose layers call `attend`."""

    def __init__(self) -> None:
        self._sequences: dict[int, dict[int, tuple[Tensor, Tensor]]] = {}
        """By sequence and layer: keys and values, [G, pages x PAGE_TOKENS, E]."""
        self._chunks: Sequence[tuple[int, int, int]] = ()

    def begin(self, chunks: Sequence[tuple[int, int, int]]) -> None:
        """The next forward pass is over these: (sequence, position of the first token, number of tokens)."""
        self._chunks = chunks

    def forget(self, sequence_id: int) -> None:
        """Free what a sequence held; unknown ones held nothing."""
        self._sequences.pop(sequence_id, None)

    def num_layers(self, sequence_id: int) -> int:
        """Layers that have keys and values of a sequence."""
        return len(self._sequences.get(sequence_id, {}))

    def page_bytes(self, sequence_id: int) -> int:
        """What one page takes, over all layers; of a sequence that has been computed."""
        pairs = self._sequences[sequence_id].values()
        return sum(x.shape[0] * PAGE_TOKENS * x.shape[2] * x.element_size() for pair in pairs for x in pair)

    def attend(
        self,
        module: torch.nn.Module,
        query_1HTE: Tensor,
        key_1GTE: Tensor,
        value_1GTE: Tensor,
        attention_mask: None,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **asked: Any,
    ) -> tuple[Tensor, None]:
        """See `transformers.AttentionInterface`. Returns [1, T, H, E], and no weights."""
        if unknown := [name for name in _UNSUPPORTED if asked.get(name) is not None]:
            raise EngineStartError(f"the model's attention asks for {', '.join(unknown)}, which is not supported")
        layer = module.layer_idx
        assert isinstance(layer, int)
        outputs, first = [], 0
        for sequence_id, start, count in self._chunks:
            part = slice(first, first + count)
            first += count
            new = key_1GTE[0, :, part], value_1GTE[0, :, part]
            keys_GNE, values_GNE = self._append(sequence_id, layer, start, *new)
            outputs.append(_attention(query_1HTE[:, :, part], keys_GNE, values_GNE, scaling, sliding_window))
        return torch.cat(outputs, 2).transpose(1, 2), None

    def _append(
        self, sequence_id: int, layer: int, start: int, keys_GTE: Tensor, values_GTE: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store a chunk; returns keys and values up to its end."""
        end = start + keys_GTE.shape[1]
        layers = self._sequences.setdefault(sequence_id, {})
        pair = layers.get(layer)
        if pair is None or end > pair[0].shape[1]:
            old_keys, old_values = pair or (None, None)
            pair = layers[layer] = _grown(old_keys, keys_GTE, end), _grown(old_values, values_GTE, end)
        pair[0][:, start:end] = keys_GTE
        pair[1][:, start:end] = values_GTE
        return pair[0][:, :end], pair[1][:, :end]


def _grown(old: Tensor | None, like_GTE: Tensor, num_tokens: int) -> Tensor:
    room = num_pages(num_tokens) * PAGE_TOKENS
    new = like_GTE.new_empty(like_GTE.shape[0], room, like_GTE.shape[2])
    if old is not None:
        new[:, : old.shape[1]] = old
    return new


def _attention(
    query_1HTE: Tensor, keys_GNE: Tensor, values_GNE: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """One sequence; its last T tokens are those that ask."""
    count, end = query_1HTE.shape[2], keys_GNE.shape[1]
    if window is not None and end > window + count - 1:
        keys_GNE, values_GNE = keys_GNE[:, 1 - window - count :], values_GNE[:, 1 - window - count :]
        end = keys_GNE.shape[1]
    mask_TN, is_whole_prompt = None, count == end and (window is None or end <= window)
    if count > 1 and not is_whole_prompt:
        positions_N = torch.arange(end, device=query_1HTE.device)
        positions_T1 = positions_N[end - count :, None]
        mask_TN = positions_N <= positions_T1
        if window is not None:
            mask_TN &= positions_N > positions_T1 - window
    return functional.scaled_dot_product_attention(
        query_1HTE,
        keys_GNE[None],
        values_GNE[None],
        attn_mask=mask_TN,
        is_causal=count > 1 and is_whole_prompt,
        scale=scaling,
        enable_gqa=query_1HTE.shape[1] != keys_GNE.shape[0],
    )
