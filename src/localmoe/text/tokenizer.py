"""One model's tokenizer: text to ids, ids to exact bytes.

Two families are known, by the decoder in `tokenizer.json`: byte-level BPE (Radford et al., 2019), whose tokens
spell bytes with printable characters, and SentencePiece (Kudo and Richardson, 2018), whose tokens spell a space
as `▁` and, with byte fallback, a byte as `<0xE4>`. Both are reduced to one table from id to bytes, so that
decoding a whole text and decoding it token by token cannot differ.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers.processors import TemplateProcessing

from localmoe.core.errors import CheckpointError
from localmoe.formats.files import read_optional_json_object, read_text

SPECIAL_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_SPACE = "▁"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable character for each byte, inverted."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_ALPHABET = _byte_alphabet()


@dataclass(frozen=True, kw_only=True)
class _Spelling:
    """How tokens spell bytes."""

    byte_level: bool
    byte_fallback: bool = False
    num_leading_spaces: int = 0
    """Spaces that the encoder puts before a text and that decoding a whole text takes off again."""

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> "_Spelling":
        if backend.decoder is None:
            raise ValueError("it has no decoder, so that its tokens cannot be turned into text")
        top = json.loads(backend.decoder.__getstate__())
        parts: list[dict[str, Any]] = top["decoders"] if top["type"] == "Sequence" else [top]
        kinds = {part["type"] for part in parts}
        if "ByteLevel" in kinds and kinds <= {"ByteLevel", "Fuse", "ByteFallback"}:
            return cls(byte_level=True)
        if kinds & {"Replace", "Metaspace"} and kinds <= {"Replace", "Metaspace", "ByteFallback", "Fuse", "Strip"}:
            spaces = 0
            for part in parts:
                if part["type"] == "Strip":
                    spaces += part["start"]
                elif part["type"] == "Metaspace":
                    spaces += part.get("prepend_scheme", "always") != "never"
            return cls(byte_level=False, byte_fallback="ByteFallback" in kinds, num_leading_spaces=spaces)
        raise ValueError(f"its decoder ({', '.join(sorted(kinds))}) is neither byte-level nor SentencePiece")

    def to_bytes(self, token: str) -> bytes:
        if self.byte_level:
            values = [_BYTE_ALPHABET.get(char) for char in token]
            known = [value for value in values if value is not None]
            return bytes(known) if len(known) == len(values) else token.encode()
        if self.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.replace(_SPACE, " ").encode()


class Tokenizer:
    """Wraps a `tokenizers.Tokenizer`; its own truncation and padding are switched off.

    Args:
        backend: as read from `tokenizer.json`.
        special_tokens: `bos_token`, `eos_token` and their like, by name.

    Raises:
        ValueError: tokens of this kind cannot be turned into bytes.
    """

    def __init__(self, backend: tokenizers.Tokenizer, *, special_tokens: dict[str, str] | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._spelling = _Spelling.of(backend)
        added = backend.get_added_tokens_decoder()
        self._added = {token_id: token.content.encode() for token_id, token in added.items()}
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._bytes: dict[int, bytes] = {}
        self.special_tokens = special_tokens or {}
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        """One more than the largest id."""
        # A spelling has at least as many bytes as what it stands for, so that no token need be decoded here.
        self.max_token_bytes = max((len(token.encode()) for token in vocab), default=1)
        """No token stands for more bytes of a text, but one for the unknown."""
        self.num_prefix_tokens = self._count_prefix()
        """Special tokens that `encode` puts before a text."""

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read `tokenizer.json` and, where present, `tokenizer_config.json`.

        Raises:
            CheckpointError: a file is missing or damaged, or the tokenizer is of an unsupported kind.
        """
        path = directory / "tokenizer.json"
        serialized = read_text(path)
        config = read_optional_json_object(directory / "tokenizer_config.json")
        special = _special_tokens(read_optional_json_object(directory / "special_tokens_map.json"))
        special |= _special_tokens(config)
        try:
            backend = tokenizers.Tokenizer.from_str(serialized)
            _apply_bos_eos(backend, config, special)
            return cls(backend, special_tokens=special)
        except Exception as error:  # tokenizers raises bare Exception for a file it does not understand
            raise CheckpointError(f"{path}: not a usable tokenizer: {error}") from error

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text. The text must hold no lone surrogates.

        Args:
            text: special tokens written out in it become those tokens.
            add_special_tokens: put the model's beginning and end tokens around it, as its files say.
        """
        # Unlike encode, lets other threads run while it works; "fast" leaves out offsets, which nobody reads.
        ids: list[int] = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; bytes that are not UTF-8 become U+FFFD."""
        kept = (i for i in token_ids if not (skip_special_tokens and i in self._special_ids))
        text = b"".join(map(self.token_bytes, kept)).decode("utf-8", "replace")
        return strip_leading_spaces(text, self.num_leading_spaces)

    def token_bytes(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for; empty for an id without a token."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id) if token_id >= 0 else None
            if token is None:
                return b""
            # Added tokens are written as themselves, whatever the alphabet of the others.
            known = self._added[token_id] if token_id in self._added else self._spelling.to_bytes(token)
            self._bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """One token's text on its own; a part of a character becomes U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_id(self, token: str) -> int | None:
        """The id of a token by its own spelling; None if there is none."""
        return self._backend.token_to_id(token)

    def special_token_id(self, text: str) -> int | None:
        """The id of the special token that is written so; None if there is none."""
        token_id = self.token_id(text)
        return token_id if token_id is not None and self.is_special(token_id) else None

    def is_special(self, token_id: int) -> bool:
        """Whether the token marks structure and is no part of an answer's text."""
        return token_id in self._special_ids

    @property
    def num_leading_spaces(self) -> int:
        """Spaces at the very beginning of a decoded sequence that the encoder had put there."""
        return self._spelling.num_leading_spaces

    def _count_prefix(self) -> int:
        plain = self.encode("a", add_special_tokens=False)
        full = self.encode("a", add_special_tokens=True)
        for start in range(len(full) - len(plain) + 1):
            if full[start : start + len(plain)] == plain:
                return start
        return 0


def strip_leading_spaces(text: str, count: int) -> str:
    """Take off at most `count` spaces at the beginning."""
    for _ in range(count):
        text = text.removeprefix(" ")
    return text


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    tokens = {}
    for name in SPECIAL_TOKEN_NAMES:
        value = config.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            tokens[name] = value
    return tokens


def _apply_bos_eos(backend: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, str]) -> None:
    """`add_bos_token` and `add_eos_token`, where either is set, replace the post-processor.

    transformers 4 did so for Llama's tokenizers; 5 looks at neither where there is a `tokenizer.json`.
    """
    if not {"add_bos_token", "add_eos_token"} & config.keys():
        return
    bos = special.get("bos_token") if config.get("add_bos_token") else None
    eos = special.get("eos_token") if config.get("add_eos_token") else None
    used: Iterable[str] = dict.fromkeys(token for token in (bos, eos) if token)
    missing = [token for token in used if backend.token_to_id(token) is None]
    if missing:
        raise ValueError(f"tokenizer_config.json names {missing[0]!r}, which is not in the vocabulary")
    backend.post_processor = TemplateProcessing(
        single=[*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])],
        special_tokens=[(token, backend.token_to_id(token)) for token in used],
    )
