"""Defaults and everything together, as read from a model directory."""

import json
from typing import Any

import pytest

from localmoe.core.errors import CheckpointError, InvalidRequestError
from localmoe.text.text_model import TextModel
from support.tiny_text import write_tiny_text_model


def test_without_recommendations_the_apis_defaults_apply(tmp_path) -> None:
    model = TextModel.load(write_tiny_text_model(tmp_path))
    defaults = model.defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k, defaults.min_p) == (1.0, 1.0, 0, 0.0)
    assert defaults.eos_token_ids == (1,)
    assert model.vocab_size == model.tokenizer.vocab_size


def test_recommendations(tmp_path) -> None:
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "eos_token_id": [7, 5],
    }
    defaults = TextModel.load(write_tiny_text_model(tmp_path, generation_config=config)).defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.95, 20)
    assert (defaults.min_p, defaults.repetition_penalty) == (0.05, 1.1)
    assert defaults.eos_token_ids == (1, 5, 7)


def test_do_sample_false_means_greedy_and_nothing_else(tmp_path) -> None:
    config = {"do_sample": False, "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.1}
    defaults = TextModel.load(write_tiny_text_model(tmp_path, generation_config=config)).defaults
    assert (defaults.temperature, defaults.top_k, defaults.repetition_penalty) == (0.0, 0, 1.0)


def test_nulls_and_minus_one_recommend_nothing(tmp_path) -> None:
    config = {"temperature": None, "top_k": -1, "eos_token_id": None}
    defaults = TextModel.load(write_tiny_text_model(tmp_path, generation_config=config)).defaults
    assert (defaults.temperature, defaults.top_k) == (1.0, 0)


def test_end_tokens_come_from_config_json_where_generation_config_has_none(tmp_path) -> None:
    write_tiny_text_model(tmp_path, generation_config={})
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 9, "vocab_size": 400}))
    model = TextModel.load(tmp_path)
    assert model.defaults.eos_token_ids == (1, 9)
    assert model.vocab_size == 400


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("generation_config.json", {"temperature": "hot"}, "temperature is 'hot'"),
        ("generation_config.json", {"temperature": True}, "temperature is True"),
        ("generation_config.json", {"top_p": 1.5}, "from 0 to 1"),
        ("generation_config.json", {"top_k": -2}, "top_k is -2"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        ("generation_config.json", {"eos_token_id": [-1]}, "eos_token_id is"),
        ("config.json", {"vocab_size": "many"}, "vocab_size is 'many'"),
        ("config.json", {"eos_token_id": [1.5]}, "eos_token_id is"),
    ],
)
def test_bad_values_are_named(tmp_path, name: str, content: dict[str, Any], complaint: str) -> None:
    path = write_tiny_text_model(tmp_path) / name
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=complaint) as caught:
        TextModel.load(tmp_path)
    assert str(caught.value).startswith(str(path))


def test_a_model_without_a_template_says_so(tmp_path) -> None:
    model = TextModel.load(write_tiny_text_model(tmp_path, chat_template=None))
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        model.render_chat([{"role": "user", "content": "x"}])
    assert caught.value.code == "chat_template_missing"
