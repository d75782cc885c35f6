"""Prompts for text in between, in the tokens of each family of models."""

import pytest
import tokenizers

from localmoe.text.fill_in_middle import FillInMiddle, OtherFile
from localmoe.text.tokenizer import Tokenizer
from support.tiny_text import tiny_byte_level_tokenizer

FAMILIES = {
    "qwen": (
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>"],
        "<|fim_prefix|>A<|fim_suffix|>B<|fim_middle|>",
    ),
    "starcoder": (["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], "<fim_prefix>A<fim_suffix>B<fim_middle>"),
    "deepseek": (
        ["<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"],
        "<｜fim▁begin｜>A<｜fim▁hole｜>B<｜fim▁end｜>",
    ),
    "code llama": (["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"], "▁<PRE>A▁<SUF>B▁<MID>"),
    "codestral": (["[PREFIX]", "[SUFFIX]"], "[SUFFIX]B[PREFIX]A"),
    "glm": (
        ["<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"],
        "<|code_prefix|>A<|code_suffix|>B<|code_middle|>",
    ),
}


def tokenizer_with(*tokens: str) -> Tokenizer:
    backend = tiny_byte_level_tokenizer()
    backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False) for token in tokens])
    return Tokenizer(backend)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_has_its_order(family: str) -> None:
    tokens, expected = FAMILIES[family]
    tokenizer = tokenizer_with(*tokens)
    fill = FillInMiddle.find(tokenizer)
    assert fill is not None
    assert tokenizer.decode(fill.prompt_ids("A", "B"), skip_special_tokens=False) == expected


def test_a_model_without_the_tokens_cannot() -> None:
    assert FillInMiddle.find(tokenizer_with()) is None
    assert FillInMiddle.find(tokenizer_with("<fim_prefix>", "<fim_suffix>")) is None


def test_the_answer_ends_where_the_file_does() -> None:
    tokens, _ = FAMILIES["qwen"]
    tokenizer = tokenizer_with(*tokens)
    fill = FillInMiddle.find(tokenizer)
    assert fill is not None
    assert fill.stop_token_ids == (tokenizer.token_id("<|fim_pad|>"),)


def test_other_files_come_first_where_there_is_a_token_for_it() -> None:
    tokens, _ = FAMILIES["qwen"]
    others = [OtherFile(name="a.py", text="x = 1")]
    with_files = tokenizer_with(*tokens, "<|file_sep|>")
    fill = FillInMiddle.find(with_files)
    assert fill is not None
    text = with_files.decode(fill.prompt_ids("A", "", others), skip_special_tokens=False)
    assert text == "<|file_sep|>a.py\nx = 1\n<|fim_prefix|>A<|fim_suffix|><|fim_middle|>"
    without = FillInMiddle.find(tokenizer_with(*tokens))
    assert without is not None
    assert (fill.takes_files, without.takes_files) == (True, False)
