"""Token by token gives what the whole gives."""

from hypothesis import given
from hypothesis import strategies as st

from localmoe.text.detokenizer import IncrementalDetokenizer
from localmoe.text.tokenizer import Tokenizer
from support.tiny_text import BOS, tiny_byte_level_tokenizer

BACKEND = tiny_byte_level_tokenizer()
TOKENIZER = Tokenizer(tiny_byte_level_tokenizer())
TOKEN_IDS = st.integers(0, BACKEND.get_vocab_size() - 1)


@given(st.lists(TOKEN_IDS, max_size=40), st.booleans())
def test_the_stream_equals_the_librarys_full_decode(ids: list[int], skip: bool) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER, skip_special_tokens=skip)
    text = "".join(map(detokenizer.push, ids)) + detokenizer.flush()
    assert text == BACKEND.decode(ids, skip_special_tokens=skip)


@given(st.text(alphabet="aé世🦊", max_size=20))
def test_valid_text_never_shows_a_replacement_character(text: str) -> None:
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    shown = ""
    for token_id in TOKENIZER.encode(text, add_special_tokens=False):
        shown += detokenizer.push(token_id)
        assert text.startswith(shown)
    assert shown + detokenizer.flush() == text


def test_a_split_character_waits_and_an_unfinished_one_is_flushed() -> None:
    fox = TOKENIZER.encode("🦊", add_special_tokens=False)
    assert len(fox) == 4
    detokenizer = IncrementalDetokenizer(TOKENIZER)
    assert [detokenizer.push(token_id) for token_id in fox] == ["", "", "", "🦊"]
    assert detokenizer.push(fox[0]) == ""
    assert detokenizer.flush() == "\ufffd"


def test_special_tokens_are_left_out_unless_wanted() -> None:
    bos = TOKENIZER.token_id(BOS)
    assert bos is not None
    assert IncrementalDetokenizer(TOKENIZER).push(bos) == ""
    assert IncrementalDetokenizer(TOKENIZER, skip_special_tokens=False).push(bos) == BOS
