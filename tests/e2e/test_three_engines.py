"""One endpoint, three engines, one checkpoint: all in float32, against transformers."""

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from localmoe.catalog.catalog import DEMO_NAME
from localmoe.cli.server_process import ServerProcess
from localmoe.text.text_model import TextModel
from support.checkpoints import greedy_reference
from support.engine_environments import with_engines

pytestmark = pytest.mark.slow

ENGINES = ("native", "vllm", "deepspeed")
NUM_TOKENS = 16
PROMPTS: list[str] = json.loads(Path("tests/data/prompts_parity.json").read_text())
SETTINGS = {
    "LOCALMOE_ENGINE__KV_CACHE_BYTES": str(1 << 29),
    "LOCALMOE_VLLM__DTYPE": "float32",
    "LOCALMOE_VLLM__ENFORCE_EAGER": "true",
    "LOCALMOE_VLLM__KV_CACHE_BYTES": str(1 << 29),
    "LOCALMOE_VLLM__MAX_MODEL_LEN": "1024",
    "LOCALMOE_DEEPSPEED__DTYPE": "float32",
    "LOCALMOE_DEEPSPEED__KV_CACHE_BYTES": str(1 << 29),
}


@pytest.fixture(scope="module")
def url(demo_home: Path) -> Iterator[str]:
    with_engines("vllm", "deepspeed")
    settings = {"LOCALMOE_HOME": str(demo_home), **SETTINGS}
    command = [sys.executable, "-m", "localmoe", "serve", DEMO_NAME, "--port", "0", "--weights", "f32"]
    for engine in ENGINES:
        command += ["--engine", engine]
    words = ["env", *(f"{name}={value}" for name, value in settings.items()), *command]
    with ServerProcess(words, grace_s=30.0) as server:
        yield server.wait_listening(lambda line: None)


@pytest.fixture(scope="module")
def expected(demo_home: Path) -> list[list[str]]:
    """The tokens, as text, that transformers generates for each prompt, without an end token."""
    directory = demo_home / "models" / DEMO_NAME
    text = TextModel.load(directory)
    rendered = [text.render_chat([{"role": "user", "content": prompt}]) for prompt in PROMPTS]
    prompts = [text.tokenizer.encode(one, add_special_tokens=False) for one in rendered]
    ends = text.defaults.eos_token_ids
    return [
        [text.tokenizer.token_text(token) for token in answer if token not in ends]
        for answer in greedy_reference(directory, prompts, NUM_TOKENS, ends)
    ]


async def ask(client: httpx2.AsyncClient, prompt: str, engine: str) -> list[str]:
    """The answer's tokens. An engine that is still starting is asked again."""
    body = {
        "model": DEMO_NAME,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": NUM_TOKENS,
        "temperature": 0,
        "logprobs": True,
    }
    while True:
        response = await client.post("/v1/chat/completions", json=body, headers={"x-localmoe-engine": engine})
        if response.status_code != 503 or "is starting" not in response.text:
            break
        await asyncio.sleep(1.0)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    tokens = tokens[:-1] if choice["finish_reason"] == "stop" else tokens  # the last one says that it is over
    assert "".join(tokens) == choice["message"]["content"]
    return tokens


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
async def test_all_engines_give_the_answers_of_transformers(
    url: str, expected: list[list[str]], engine: str
) -> None:
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        await ask(client, PROMPTS[0], engine)
        answers = await asyncio.gather(*(ask(client, prompt, engine) for prompt in PROMPTS))
    assert answers == expected


async def test_who_answered_is_counted(url: str) -> None:
    async with httpx2.AsyncClient(base_url=url, timeout=600) as client:
        for engine in ENGINES:
            await ask(client, PROMPTS[0], engine)
        lines = (await client.get("/metrics")).text.splitlines()
    for engine in ENGINES:
        wanted = (
            f'localmoe_dispatch_answers_total{{engine="{engine}",model_name="{DEMO_NAME}",outcome="complete"}} '
        )
        assert any(line.startswith(wanted) for line in lines)
