"""A Hugging Face tokenizer out of a GGUF file's vocabulary and merges."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from localmoe.core.errors import CheckpointError
from localmoe.formats.gguf import GGUFFile

_CONTROL = 3
"""`tokenizer.ggml.token_type` of tokens that carry no text."""


def build_tokenizer(file: GGUFFile) -> Tokenizer:
    """Byte-level BPE with SmolLM's splitting: every digit alone, then GPT-2's pattern.

    Raises:
        CheckpointError: the file has another kind of tokenizer, or its vocabulary and merges do not fit.
    """
    kind = (file.metadata.get("tokenizer.ggml.model"), file.metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(f"{file.path}: tokenizer {kind!r:.80} is not supported; ('gpt2', 'smollm') is")
    tokens = file.value("tokenizer.ggml.tokens", list)
    joined = file.value("tokenizer.ggml.merges", list)
    types = file.value("tokenizer.ggml.token_type", np.ndarray)
    try:
        merges = [(left, right) for left, right in (merge.split(" ") for merge in joined)]
        tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    except Exception as error:  # the Rust library raises plain Exception
        raise CheckpointError(f"{file.path}: vocabulary and merges do not fit each other: {error}") from error
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    return tokenizer


def write_tokenizer(file: GGUFFile, tokenizer: Tokenizer, path: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json`, `special_tokens_map.json` and `chat_template.jinja`.

    Raises:
        CheckpointError: a special token or the chat template is missing.
    """
    special = {
        name: _token(file, tokenizer, f"tokenizer.ggml.{key}_token_id")
        for name, key in (
            ("bos_token", "bos"),
            ("eos_token", "eos"),
            ("pad_token", "padding"),
            ("unk_token", "unknown"),
        )
    }
    chat_template = file.value("tokenizer.chat_template", str)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": file.value("llama.context_length", int),
        "added_tokens_decoder": {
            str(index): {
                "content": added.content,
                "lstrip": added.lstrip,
                "normalized": added.normalized,
                "rstrip": added.rstrip,
                "single_word": added.single_word,
                "special": added.special,
            }
            for index, added in tokenizer.get_added_tokens_decoder().items()
        },
        **special,
    }
    tokenizer.save(str(path / "tokenizer.json"))
    _write_json(path / "tokenizer_config.json", config)
    _write_json(path / "special_tokens_map.json", special)
    (path / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def _token(file: GGUFFile, tokenizer: Tokenizer, key: str) -> str:
    index = file.value(key, int)
    token = tokenizer.id_to_token(index) if 0 <= index < tokenizer.get_vocab_size() else None
    if token is None:
        raise CheckpointError(f"{file.path}: {key}: token {index} is not in the vocabulary")
    return token


def _write_json(path: Path, document: dict[str, Any]) -> None:
    path.write_bytes(msgspec.json.format(msgspec.json.encode(document)))
