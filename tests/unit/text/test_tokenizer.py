"""The tokenizer against the library's own decoding, and against transformers for the beginning token."""

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers

from localmoe.core.errors import CheckpointError
from localmoe.text.tokenizer import Tokenizer
from support.tiny_text import BOS, EOS, tiny_byte_level_tokenizer, write_tiny_text_model

BACKEND = tiny_byte_level_tokenizer()
BYTE_LEVEL = Tokenizer(tiny_byte_level_tokenizer())


def sentencepiece_backend() -> tokenizers.Tokenizer:
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁Hi",
        "▁the",
        "re",
        "H",
        "i",
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True, ignore_merges=True
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return backend


@given(st.lists(st.integers(0, BACKEND.get_vocab_size() - 1), max_size=30), st.booleans())
def test_byte_level_decoding_equals_the_librarys(ids: list[int], skip: bool) -> None:
    assert BYTE_LEVEL.decode(ids, skip_special_tokens=skip) == BACKEND.decode(ids, skip_special_tokens=skip)


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=40))
def test_byte_level_round_trip(text: str) -> None:
    if BOS in text or EOS in text:
        return
    ids = BYTE_LEVEL.encode(text, add_special_tokens=False)
    assert BYTE_LEVEL.decode(ids) == text
    assert b"".join(map(BYTE_LEVEL.token_bytes, ids)) == text.encode()


@given(st.lists(st.sampled_from(["▁Hi", "▁the", "re", "▁", "H", "世", "é"]), max_size=12))
def test_sentencepiece_decoding_equals_the_librarys(pieces: list[str]) -> None:
    backend = sentencepiece_backend()
    tokenizer = Tokenizer(backend)
    ids: list[int] = []
    for piece in pieces:
        known = backend.token_to_id(piece)
        ids += [3 + byte for byte in piece.encode()] if known is None else [known]
    assert tokenizer.decode(ids) == backend.decode(ids)


def test_sentencepiece_bytes() -> None:
    tokenizer = Tokenizer(sentencepiece_backend())
    assert tokenizer.token_bytes(3 + 0xE4) == b"\xe4"
    hi = tokenizer.token_id("▁Hi")
    assert hi is not None
    assert tokenizer.token_text(hi) == " Hi"
    assert tokenizer.decode([1, hi]) == "Hi"


def test_added_tokens_are_written_as_themselves() -> None:
    backend = tiny_byte_level_tokenizer()
    backend.add_tokens([AddedToken("é", special=False)])
    tokenizer = Tokenizer(backend)
    token_id = tokenizer.token_id("é")
    assert token_id is not None
    assert tokenizer.token_bytes(token_id) == "é".encode()


def test_ids_without_a_token_have_no_bytes() -> None:
    assert BYTE_LEVEL.token_bytes(BYTE_LEVEL.vocab_size + 5) == b""
    assert BYTE_LEVEL.token_bytes(-1) == b""


def test_the_files_own_truncation_and_padding_are_switched_off(tmp_path) -> None:
    write_tiny_text_model(tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.enable_truncation(max_length=2)
    backend.enable_padding(length=5)
    backend.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.load(tmp_path)
    assert (
        tokenizer.decode(tokenizer.encode("hello world, hello", add_special_tokens=True)) == "hello world, hello"
    )


@pytest.mark.parametrize("add_bos", [None, False, True])
@pytest.mark.parametrize("add_eos", [None, False, True])
def test_beginning_and_end_tokens_are_transformers(tmp_path, add_bos: bool | None, add_eos: bool | None) -> None:
    from transformers import PreTrainedTokenizerFast

    given = {"add_bos_token": add_bos, "add_eos_token": add_eos}
    config = {name: value for name, value in given.items() if value is not None}
    write_tiny_text_model(tmp_path, tokenizer_config=config)
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token=BOS, eos_token=EOS, **config
    )
    ours = Tokenizer.load(tmp_path)
    for add_special_tokens in (False, True):
        assert ours.encode("hello", add_special_tokens=add_special_tokens) == theirs.encode(
            "hello", add_special_tokens=add_special_tokens
        )
    assert ours.num_prefix_tokens == bool(add_bos)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("tokenizer.json", None, "cannot be read"),
        ("tokenizer.json", b"\xff\xfe", "not UTF-8"),
        ("tokenizer.json", b"{}", "not a usable tokenizer"),
        ("tokenizer_config.json", b"[1]", "holds a JSON list"),
        ("tokenizer_config.json", b"{", "not valid JSON"),
        ("tokenizer_config.json", b"[" * 100_000, "not valid JSON"),
    ],
)
def test_damaged_files_are_named(tmp_path, name: str, content: bytes | None, complaint: str) -> None:
    path = write_tiny_text_model(tmp_path) / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=complaint) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).startswith(str(path))


def test_a_beginning_token_outside_the_vocabulary_is_refused(tmp_path) -> None:
    write_tiny_text_model(tmp_path, tokenizer_config={"bos_token": "<none>", "add_bos_token": True})
    with pytest.raises(CheckpointError, match="'<none>', which is not in the vocabulary"):
        Tokenizer.load(tmp_path)


def test_an_unknown_kind_of_decoder_is_refused(tmp_path) -> None:
    path = write_tiny_text_model(tmp_path) / "tokenizer.json"
    data = json.loads(path.read_text())
    data["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    path.write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match="WordPiece"):
        Tokenizer.load(tmp_path)
