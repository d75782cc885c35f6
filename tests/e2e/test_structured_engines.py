"""Grammars in engines as they are served: the native one in its process, and vLLM."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from localmoe.backends.native import NativeBackend
from localmoe.backends.vllm import ServedModel, VllmBackend
from localmoe.backends.vllm_config import VllmConfig
from localmoe.core.errors import InvalidRequestError
from localmoe.core.events import EventBus
from localmoe.core.protocols import Generator
from localmoe.core.request import FinishReason, Grammar, Request, SamplingParams
from localmoe.engine.config import EngineConfig
from localmoe.text.grammar_source import written
from localmoe.text.text_model import TextModel
from support.checkpoints import write_checkpoint
from support.engine_environments import with_engines

pytestmark = pytest.mark.slow

EOS = 1
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3},
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": Grammar(kind="json_schema", source=json.dumps(SCHEMA)),
    "regex": Grammar(kind="regex", source="[a-f]{8}-[0-9]{2}"),
    "choice": Grammar(kind="choice", source='["red", "green", "blue"]'),
    "rules": Grammar(kind="lark", source='start: "<" WORD ("," WORD)~2 ">"\nWORD: /[a-z]{1,8}/'),
    "special token": Grammar(kind="lark", source='start: "<" <[0]> ">"'),
}
LONG = ("a{1000000}", "(a?){5000}a{5000}")
"""Where most of what follows is certain."""


def request(name: str, grammar: Grammar, *, max_tokens: int = 300) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, seed=3, grammar=grammar, stop_token_ids=(EOS,))
    return Request(id=name, model="m", prompt_ids=[5, 17, 3, 99], sampling=sampling)


async def answer(engine: Generator, asked: Request) -> tuple[list[int], FinishReason | None]:
    token_ids: list[int] = []
    reason = None
    async with asyncio.timeout(120), aclosing(engine.generate(asked)) as chunks:
        async for chunk in chunks:
            token_ids += chunk.token_ids
            reason = chunk.finish_reason
    return token_ids, reason


def check(name: str, text: str) -> None:
    match name:
        case "schema":
            value = json.loads(text)
            assert list(value) == ["name", "tags", "size"]
            assert len(value["name"]) <= 8
            assert {*value["tags"]} <= {"a", "b"}
            assert 1 <= value["size"] <= 99
        case "choice":
            assert text in ("red", "green", "blue")
        case "regex":
            assert len(text) == 11
        case "rules":
            assert text.startswith("<")
            assert text.count(",") == 2
        case "special token":
            assert text == "<>"


async def check_long(backend: Generator) -> None:
    for source in LONG:
        started_s = time.monotonic()
        asked = request("long", Grammar(kind="regex", source=source), max_tokens=20)
        token_ids, reason = await answer(backend, asked)
        assert (len(token_ids), reason) == (20, FinishReason.LENGTH)
        assert time.monotonic() - started_s < 10


@asynccontextmanager
async def native(home: Path, **config: Any) -> AsyncIterator[NativeBackend]:
    path = home / "models/distinct-experts"
    backend = NativeBackend(
        model="m",
        store_path=path / "stores/f32.store",
        tokenizer_path=path,
        config=EngineConfig(**{"num_threads": 1, **config}),
        available_memory=lambda: 1 << 32,
        bus=EventBus(),
    )
    await backend.start()
    try:
        yield backend
    finally:
        await backend.stop()


async def test_the_native_engine(tiny_home: Path) -> None:
    text = TextModel.load(tiny_home / "models/distinct-experts")
    async with native(tiny_home) as backend:
        found = await asyncio.gather(*(answer(backend, request(*each)) for each in GRAMMARS.items()))
        for name, (token_ids, reason) in zip(GRAMMARS, found, strict=True):
            assert reason is FinishReason.STOP
            check(name, text.tokenizer.decode(token_ids))
        # A beginning that was generated elsewhere.
        whole = found[0][0]
        begun = Request(
            id="r",
            model="m",
            prompt_ids=[5, 17, 3, 99],
            sampling=request("s", GRAMMARS["schema"]).sampling,
            resumed_ids=whole[:7],
        )
        assert (await answer(backend, begun))[0] == whole[7:]


async def test_what_cannot_be_compiled_is_the_requests_own_fault_and_the_worker_lives(tiny_home: Path) -> None:
    deep = "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(9000)) + '\nr9000: "deep"'
    hostile = [Grammar(kind="regex", source="("), Grammar(kind="json_schema", source='{"$ref": "#"}')]
    async with native(tiny_home) as backend:
        steady = asyncio.create_task(answer(backend, request("steady", GRAMMARS["schema"])))
        for grammar in hostile:
            with pytest.raises(InvalidRequestError):
                await answer(backend, request("bad", grammar))
        assert await answer(backend, request("deep", Grammar(kind="lark", source=deep)))
        await check_long(backend)
        assert (await steady)[1] is FinishReason.STOP


async def test_an_answer_whose_reader_has_left_frees_its_place(tiny_home: Path) -> None:
    async with native(tiny_home, max_num_seqs=1) as backend:
        asked = request("left", Grammar(kind="regex", source="a{900}"), max_tokens=900)
        async with aclosing(backend.generate(asked)) as chunks:
            async for _ in chunks:
                break
        token_ids, reason = await answer(backend, request("next", GRAMMARS["choice"]))
        assert token_ids
        assert reason is FinishReason.STOP


async def test_vllm(tmp_path: Path) -> None:
    environments = with_engines("vllm")
    # Heads of a size that vLLM's attention on a processor takes.
    path = write_checkpoint(tmp_path / "m", "mixtral", head_dim=32)
    text = TextModel.load(path)
    backend = VllmBackend(
        model=ServedModel(name="m", vocab_size=text.vocab_size),
        model_path=path,
        config=VllmConfig(
            dtype="float32",
            enforce_eager=True,
            max_num_seqs=4,
            kv_cache_bytes=1 << 27,
            max_model_len=1024,
            start_timeout_s=300.0,
        ),
        python=environments.python("vllm"),
        on_gpu=False,
        write_grammar=written,
        bus=EventBus(),
    )
    await backend.start()
    try:
        for name, grammar in GRAMMARS.items():
            assert backend.refusal(request(name, grammar)) is None
            token_ids, reason = await answer(backend, request(name, grammar))
            assert reason is FinishReason.STOP
            check(name, text.tokenizer.decode(token_ids))
        await check_long(backend)
    finally:
        await backend.stop()
