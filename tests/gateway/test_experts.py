"""`GET /v1/experts`."""

import asyncio
import dataclasses
import json

import httpx2
import msgspec
from fastapi import FastAPI

from localmoe.backends.scripted import ScriptedBackend
from localmoe.core.errors import BackendUnavailableError
from localmoe.core.inspection import Inspection, InspectionList
from localmoe.text.text_model import TextModel
from support.inspections import make_inspection
from support.tiny_text import gateway_app, served_model


class Inspected:
    """An engine of which a tenth of a second is enough to look into it."""

    def __init__(self, answer: Inspection | Exception) -> None:
        self._answer = answer

    async def inspect(self) -> Inspection:
        await asyncio.sleep(0.1)
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def app_of(text_model: TextModel, **models: Inspected | None) -> FastAPI:
    served = []
    for name, inspectable in models.items():
        model = served_model(text_model, ScriptedBackend([5]), model_id=name)
        served.append(dataclasses.replace(model, inspectables=[inspectable] if inspectable else []))
    return gateway_app(*served)


async def ask(app: FastAPI) -> httpx2.Response:
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        return await client.get("/v1/experts")


async def test_every_model_that_can_be_looked_into_is_listed(text_model: TextModel) -> None:
    tiered, resident = make_inspection(model="a"), make_inspection(model="b", tiers=None, links=[])
    response = await ask(app_of(text_model, a=Inspected(tiered), c=None, b=Inspected(resident)))
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert msgspec.json.decode(response.content, type=InspectionList).data == [tiered, resident]
    first = response.json()["data"][0]
    assert first["heat"] == [[8, 0, 4, 4], [1, 1, 1, 13]]
    assert first["placement"][0] == ["ram", "disk", "ram", "ram"]
    assert first["tiers"]["hits"] == 30


async def test_an_engine_that_is_not_ready_is_503(text_model: TextModel) -> None:
    error = BackendUnavailableError("the engine of a is not ready: it is starting")
    response = await ask(app_of(text_model, a=Inspected(error)))
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert response.json()["error"] == {
        "message": "the engine of a is not ready: it is starting",
        "type": "server_error",
        "param": None,
        "code": "engine_unavailable",
    }


async def test_an_engine_that_is_not_ready_does_not_hide_the_others(text_model: TextModel) -> None:
    error = BackendUnavailableError("the engine of a is not ready: it is starting")
    other = make_inspection(model="b")
    response = await ask(app_of(text_model, a=Inspected(error), b=Inspected(other)))
    assert response.status_code == 200
    assert msgspec.json.decode(response.content, type=InspectionList).data == [other]


async def test_only_get_is_allowed(text_model: TextModel) -> None:
    app = app_of(text_model)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        response = await client.post("/v1/experts")
    assert response.status_code == 405


def test_the_documentation_names_every_field(text_model: TextModel) -> None:
    document = app_of(text_model).openapi()
    operation = document["paths"]["/v1/experts"]["get"]
    schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/InspectionList"}
    assert operation["responses"]["5XX"]
    schemas = document["components"]["schemas"]
    assert set(schemas["Inspection"]["properties"]) == set(Inspection.__struct_fields__)
    for name in ("TierState", "MemoryUse", "MemoryShare", "LinkUse", "LayerTimes"):
        assert schemas[name]["properties"]
    assert "msgspec" not in json.dumps(document)
