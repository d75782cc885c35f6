"""Every API of a real server over a real engine, with the official SDKs as they are; and what a restart keeps."""

import io
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import anthropic
import httpx2
import openai
import pytest

from support.server import running_server

MODEL = "distinct-experts"


@contextmanager
def clients(home: Path, database: Path) -> Iterator[tuple[openai.OpenAI, anthropic.Anthropic, str]]:
    settings = {
        "STATE__DATABASE_URL": f"sqlite:///{database}",
        "STATE__FILES_DIRECTORY": str(database.with_name("files")),
        "GATEWAY__CACHE__ENABLED": "true",
    }
    with (
        running_server(home, MODEL, "f32", settings=settings) as (url, _),
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=60, max_retries=0) as openai_client,
        anthropic.Anthropic(base_url=url, api_key="none", timeout=60, max_retries=0) as anthropic_client,
    ):
        yield openai_client, anthropic_client, url


def test_official_sdks_and_a_restart(tiny_home: Path, tmp_path: Path) -> None:
    database = tmp_path / "state.db"
    with clients(tiny_home, database) as (sdk, claude, url):
        assert MODEL in [model.id for model in sdk.models.list()]
        chat = sdk.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "hello"}], max_tokens=5, temperature=0
        )
        assert chat.usage is not None
        assert chat.usage.completion_tokens <= 5
        told = sdk.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hello"}],
            max_tokens=60,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "yes", "schema": {"enum": ["yes", "no"]}, "strict": True},
            },
        )
        assert json.loads(told.choices[0].message.content or "") in ("yes", "no")
        assert sdk.completions.create(model=MODEL, prompt="a", max_tokens=4).usage is not None
        vectors = sdk.embeddings.create(model=MODEL, input=["hello", "world"]).data
        assert len(vectors) == 2
        assert sum(x * x for x in vectors[0].embedding) == pytest.approx(1, abs=1e-4)
        said = sdk.responses.create(model=MODEL, input="hello", max_output_tokens=16)
        message = claude.messages.create(model=MODEL, max_tokens=6, messages=[{"role": "user", "content": "hi"}])
        counted = claude.messages.count_tokens(model=MODEL, messages=[{"role": "user", "content": "hi"}])
        assert message.usage.input_tokens == counted.input_tokens
        with claude.messages.stream(
            model=MODEL, max_tokens=6, messages=[{"role": "user", "content": "hi"}]
        ) as stream:
            assert stream.get_final_message().usage.output_tokens <= 6
        # The same again is from the cache.
        body = {"model": MODEL, "prompt": "twice", "max_tokens": 4, "temperature": 0}
        first, second = (httpx2.post(f"{url}/v1/completions", json=body) for _ in range(2))
        assert second.headers["x-localmoe-cache"].startswith("hit")
        assert first.json()["choices"] == second.json()["choices"]

        requests = [
            {
                "custom_id": f"number {index}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": MODEL, "prompt": f"{index}", "max_tokens": 4},
            }
            for index in range(20)
        ]
        lines = "\n".join(map(json.dumps, requests)).encode()
        uploaded = sdk.files.create(file=("requests.jsonl", io.BytesIO(lines)), purpose="batch")
        batch = sdk.batches.create(input_file_id=uploaded.id, endpoint="/v1/completions", completion_window="24h")

    with clients(tiny_home, database) as (sdk, _, url):
        assert sdk.responses.retrieve(said.id).output_text == said.output_text
        again = sdk.responses.create(
            model=MODEL, input="and now", previous_response_id=said.id, max_output_tokens=16
        )
        assert again.previous_response_id == said.id
        while (found := sdk.batches.retrieve(batch.id)).status not in ("completed", "failed", "cancelled"):
            time.sleep(0.05)
        assert found.status == "completed"
        assert found.output_file_id is not None
        answers = [json.loads(line) for line in sdk.files.content(found.output_file_id).text.splitlines()]
        assert sorted(answer["custom_id"] for answer in answers) == sorted(r["custom_id"] for r in requests)
        assert all(answer["response"]["status_code"] == 200 for answer in answers)
        job = httpx2.post(f"{url}/v1/inference", json={"model": MODEL, "text": "Hi", "mode": "async"}).json()
        while (state := httpx2.get(f"{url}/v1/jobs/{job['id']}").json())["status"] not in ("completed", "failed"):
            time.sleep(0.05)
        assert state["status"] == "completed", state
