"""Text in, vector out: OpenAI's own client, a real server, the native engine's process, and transformers."""

from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch

from localmoe.text.text_model import TextModel
from support.checkpoints import load_reference
from support.server import metric, running_server

MODEL = "distinct-experts"
TEXTS = ["The quick brown fox", "jumps over the lazy dog. " * 8, "x"]


@pytest.fixture
def expected(tiny_home: Path) -> list[list[float]]:
    reference: Any = load_reference(tiny_home / "checkpoints" / MODEL)
    tokenizer = TextModel.load(tiny_home / "models" / MODEL).tokenizer
    vectors = []
    for text in TEXTS:
        with torch.inference_mode():
            ids = torch.tensor([tokenizer.encode(text, add_special_tokens=True)])
            mean = reference.model(ids).last_hidden_state[0].mean(0)
            vectors.append(torch.nn.functional.normalize(mean, dim=0).tolist())
    return vectors


def test_they_are_transformers(tiny_home: Path, expected: list[list[float]]) -> None:
    with running_server(tiny_home, MODEL, "f32") as (url, _):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            found = client.embeddings.create(model=MODEL, input=TEXTS)
            plain = client.embeddings.create(model=MODEL, input=TEXTS[1], encoding_format="float")
        for item, vector in zip(found.data, expected, strict=True):
            assert item.embedding == pytest.approx(vector, abs=1e-4)
        assert plain.data[0].embedding == found.data[1].embedding
        assert metric(url, "vllm:prompt_tokens_total") == found.usage.prompt_tokens + plain.usage.prompt_tokens
        too_long = httpx2.post(f"{url}/v1/embeddings", json={"model": MODEL, "input": "ab " * 1100})
        assert (too_long.status_code, too_long.json()["error"]["code"]) == (400, "context_length_exceeded")
