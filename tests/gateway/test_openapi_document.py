"""The whole OpenAPI document, tried at random: what it says of requests and of answers is so, and nothing breaks.

Streams are left out: whether their events are as documented is tested where they are.
"""

import asyncio
import copy
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx2
import pytest
import requests
import schemathesis
import uvicorn
from fastapi import FastAPI
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.checks import CheckFunction, not_a_server_error
from schemathesis.core.transport import Response
from schemathesis.generation import GenerationMode
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi import checks as of_openapi

from localmoe.backends.scripted import ScriptedBackend
from localmoe.cli.state import ServerState
from localmoe.core.current import Current
from localmoe.core.events import EventBus
from localmoe.core.serving import ModelSpec
from localmoe.gateway.app import create_app
from localmoe.gateway.config import GatewayConfig
from localmoe.state.config import StateConfig
from localmoe.text.text_model import TextModel
from support.configured import configured_server
from support.tiny_text import encode, make_services, served_model

CHECKS: list[CheckFunction] = [
    not_a_server_error,
    of_openapi.status_code_conformance,
    of_openapi.content_type_conformance,
    of_openapi.response_headers_conformance,
    of_openapi.response_schema_conformance,
]
RULES = settings(
    max_examples=20,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
    verbosity=Verbosity.quiet,
)
LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "hi"}}
ENDLESS_LINE = LINE | {"body": {"model": "slow", "prompt": "hi"}}
SETTING = "dispatch.max_queued"


class WillingOperations:
    """Serves all the time what is served already."""

    async def load(self, spec: ModelSpec) -> None:
        pass

    async def unload(self, name: str) -> None:
        pass

    async def switch(self, name: str | None, spec: ModelSpec) -> None:
        pass


@asynccontextmanager
async def whole_app(text: TextModel, home: Path) -> AsyncIterator[FastAPI]:
    """All that a server may have, over a scripted model and one that takes its time."""
    backend, slow = ScriptedBackend(encode(text, "hello world")), ScriptedBackend([40], delay_s=600)
    bus, config = EventBus(), GatewayConfig()
    await backend.start()
    await slow.start()
    (home / "config.yaml").write_text("models: [{model: tiny}]\n")
    state = ServerState(StateConfig(), Current(config), home=home)
    async with configured_server(home / "config.yaml", text) as configured:
        services = replace(
            make_services(bus, operations=WillingOperations()),
            responses=state.responses,
            jobs=state.jobs,
            configuration=configured.manager,
        )
        models = {"tiny": served_model(text, backend), "slow": served_model(text, slow, model_id="slow")}
        app = create_app(models, services=services, config=Current(config), bus=bus)
        state.start(app)
        try:
            yield app
        finally:
            await state.stop()
            await state.close()


@asynccontextmanager
async def listening(app: FastAPI) -> AsyncIterator[str]:
    """Its URL, while it is served."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, ws="none"))
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            await serving


async def things_to_name(url: str) -> dict[tuple[str, str], str]:
    """Of each operation on something: the name of one that is there. What one operation ends is another's nothing."""
    asked = {"model": "tiny", "input": "hi"}
    async with httpx2.AsyncClient(base_url=url) as client:

        async def made(path: str, **fields: Any) -> str:
            response = await client.post(path, **fields)
            assert response.is_success, response.text
            name: str = response.json()["id"]
            return name

        async def response() -> str:
            return await made("/v1/responses", json={**asked, "background": True})

        async def file(line: dict[str, Any] = LINE) -> str:
            files = {"file": ("a.jsonl", json.dumps(line))}
            return await made("/v1/files", files=files, data={"purpose": "batch"})

        async def batch(line: dict[str, Any] = LINE) -> str:
            body = {"input_file_id": await file(line), "endpoint": "/v1/completions", "completion_window": "24h"}
            return await made("/v1/batches", json=body)

        async def job() -> str:
            return await made("/v1/inference", json={"model": "tiny", "text": "hi", "async": True})

        return {
            ("GET", "/v1/models/{model_id}"): "tiny",
            ("GET", "/v1/config/{key}"): SETTING,
            ("PATCH", "/v1/config/{key}"): SETTING,
            ("GET", "/v1/responses/{response_id}"): await response(),
            ("DELETE", "/v1/responses/{response_id}"): await response(),
            ("POST", "/v1/responses/{response_id}/cancel"): await response(),
            ("GET", "/v1/responses/{response_id}/input_items"): await response(),
            ("GET", "/v1/files/{file_id}"): await file(),
            ("GET", "/v1/files/{file_id}/content"): await file(),
            ("DELETE", "/v1/files/{file_id}"): await file(),
            ("POST", "/v1/batches"): await file(),
            ("GET", "/v1/batches/{batch_id}"): await batch(),
            ("POST", "/v1/batches/{batch_id}/cancel"): await batch(ENDLESS_LINE),
            ("GET", "/v1/jobs/{job_id}"): await job(),
            ("DELETE", "/v1/jobs/{job_id}"): await job(),
        }


def narrowed(document: dict[str, Any], file_id: str) -> dict[str, Any]:
    """The document with values that are there in place of any: hardly a random name is one of a model."""
    narrow: dict[str, dict[str, Any]] = {
        "model": {"const": "tiny"},
        "model_name": {"type": "null"},
        "replace": {"const": "tiny"},
        "input_file_id": {"const": file_id},
        "previous_response_id": {"type": "null"},
        "version": {"const": 1},
        "tokens": {"const": [40, 41]},
        "value": {"type": "integer", "minimum": 1, "maximum": 1000},
        "max_tokens": {"type": "integer", "minimum": 1, "maximum": 64},
    }
    fixed = {field: rule["const"] for field, rule in narrow.items() if "const" in rule}
    document = copy.deepcopy(document)
    for name, schema in document["components"]["schemas"].items():
        if not name.endswith("Request"):
            continue
        for field in schema["properties"].keys() & narrow.keys():
            schema["properties"][field] = narrow[field]
        for example in schema.get("examples", []):
            example |= {field: value for field, value in fixed.items() if field in example}
    return document


@dataclass
class Tried:
    """What came of one operation."""

    num_cases: int = 0
    num_successes: int = 0
    failure: Exception | None = None


class Trial:
    """Asks for all that a document says one can ask for.

    Args:
        names: see `things_to_name`.
    """

    def __init__(self, document: dict[str, Any], url: str, names: dict[tuple[str, str], str]) -> None:
        self._document = document
        self._schema = schemathesis.openapi.from_dict(document)
        self._url = url
        self._names = names
        self.tried: dict[tuple[str, str], Tried] = {}

    def run(self) -> None:
        """Every operation, as its example says, and at random."""
        with requests.Session() as session:
            for found in self._schema.get_all_operations():
                operation = found.ok()
                key = operation.method.upper(), operation.path
                self.tried[key] = tried = Tried()
                try:
                    self._try(operation, tried, session)
                except Exception as error:
                    tried.failure = error

    def _try(self, operation: APIOperation[Any, Any, Any, Any], tried: Tried, session: requests.Session) -> None:
        def check(case: schemathesis.Case[Any]) -> Response:
            response = case.call(base_url=self._url, session=session)
            is_stream = response.headers.get("content-type", [""])[0].startswith("text/event-stream")
            checks = CHECKS[:-1] if is_stream else CHECKS
            if case.meta is not None and case.meta.generation.mode is GenerationMode.NEGATIVE:
                checks = [*checks, of_openapi.negative_data_rejection]
            case.validate_response(response, checks=checks, transport_kwargs={"base_url": self._url})
            tried.num_cases += 1
            tried.num_successes += 200 <= response.status_code < 300
            return response

        def check_generated(case: schemathesis.Case[Any]) -> None:
            check(case)

        key = operation.method.upper(), operation.path
        path = operation.path
        named = {path[path.index("{") + 1 : path.index("}")]: self._names[key]} if "{" in path else None
        body = self._example(key)
        if body is not None:
            case = operation.Case(path_parameters=named, body=body, media_type="application/json")
            response = check(case)
            assert response.status_code < 300, f"the example of {operation.label}: {response.text}"
        for mode, names in self._ways(named):
            cases = operation.as_strategy(generation_mode=mode, path_parameters=names)
            with suppress(Unsatisfiable):  # where nothing is asked for, nothing can be wrong
                RULES(given(case=cases)(check_generated))()

    @staticmethod
    def _ways(named: dict[str, str] | None) -> Iterator[tuple[GenerationMode, dict[str, str] | None]]:
        """How to ask: for what is there, wrongly, and for what is not there."""
        yield GenerationMode.POSITIVE, named
        yield GenerationMode.NEGATIVE, named
        if named is not None:
            yield GenerationMode.POSITIVE, None

    def _example(self, key: tuple[str, str]) -> dict[str, Any] | None:
        method, path = key
        content = self._document["paths"][path][method.lower()].get("requestBody", {}).get("content", {})
        schema = content.get("application/json", {}).get("schema", {})
        ref = schema.get("$ref") or next((one["$ref"] for one in schema.get("anyOf", ()) if "$ref" in one), None)
        if ref is None:
            return None
        (example,) = self._document["components"]["schemas"][ref.rsplit("/", 1)[1]]["examples"]
        return dict(example)


@pytest.mark.slow
async def test_all_answers_are_as_documented(coder: TextModel, tmp_path: Path) -> None:
    async with whole_app(coder, tmp_path) as app, listening(app) as url:
        names = await things_to_name(url)
        document = narrowed(app.openapi(), names["POST", "/v1/batches"])
        trial = Trial(document, url, names)
        await asyncio.to_thread(trial.run)
    operations = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    assert trial.tried.keys() == operations
    failures = [f"{key}: {tried.failure}" for key, tried in trial.tried.items() if tried.failure is not None]
    assert not failures, "\n\n".join(failures)
    assert not [key for key, tried in trial.tried.items() if tried.num_successes == 0]
