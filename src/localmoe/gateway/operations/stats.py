"""`GET /v1/stats/memory` and `/v1/stats/performance`."""

import asyncio
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel

from localmoe.core.inspection import Inspection
from localmoe.core.protocols import MemoryMeter, PerformanceStats
from localmoe.gateway.context import GatewayContext
from localmoe.gateway.openapi import ERROR_RESPONSES
from localmoe.gateway.operations.experts import inspect_all

MAX_WINDOW_S = 3600.0


class MemoryOfMachine(BaseModel):
    """RAM, or the memory of one GPU."""

    name: str
    """`ram`, or `gpu0` and so on."""
    total_bytes: int
    available_bytes: int


class MemoryOfPart(BaseModel):
    """One use of an engine's memory."""

    name: str
    planned_bytes: int
    used_bytes: int | None


class MemoryOfEngine(BaseModel):
    """What one native engine has taken."""

    model: str
    engine: str
    budget_bytes: int
    process_bytes: int
    parts: list[MemoryOfPart]


class MemoryStats(BaseModel):
    """Of the machine and of the engines that can say."""

    object: Literal["stats.memory"] = "stats.memory"
    machine: list[MemoryOfMachine]
    engines: list[MemoryOfEngine]


class SummaryOf(BaseModel):
    """Of what was measured several times."""

    count: int
    sum: float
    mean: float
    min: float
    max: float


class PerformanceOf(BaseModel):
    """Answers finished in the window, by what was measured; names have units, and nothing is there of what there was
    none of."""

    object: Literal["stats.performance"] = "stats.performance"
    window_s: float
    model: str | None
    measured: dict[str, SummaryOf]


def router(context: GatewayContext, performance: PerformanceStats, memory: MemoryMeter) -> APIRouter:
    """The routes."""
    routes = APIRouter(tags=["operations"], prefix="/v1/stats", responses=ERROR_RESPONSES)

    @routes.get("/memory", summary="Memory of the machine and of native engines")
    async def memory_stats() -> MemoryStats:
        # In a thread, because a driver may take its time.
        machine = await asyncio.to_thread(memory.memory)
        return MemoryStats(
            machine=[MemoryOfMachine(**vars(part)) for part in machine],
            engines=[_of_engine(found) for found in await inspect_all(context)],
        )

    @routes.get("/performance", summary="What answers took lately")
    async def performance_stats(
        window_s: Annotated[float, Query(gt=0, le=MAX_WINDOW_S, allow_inf_nan=False)] = 60.0,
        model: Annotated[str | None, Query(max_length=512, description="Of this one only.")] = None,
    ) -> PerformanceOf:
        name = None if model is None else context.model(model).id
        summaries = performance.summaries(window_s, name)
        measured = {key: SummaryOf(**vars(summary)) for key, summary in summaries.items()}
        return PerformanceOf(window_s=window_s, model=name, measured=measured)

    return routes


def _of_engine(found: Inspection) -> MemoryOfEngine:
    return MemoryOfEngine(
        model=found.model,
        engine=found.engine,
        budget_bytes=found.memory.budget_bytes,
        process_bytes=found.memory.process_bytes,
        parts=[
            MemoryOfPart(name=share.name, planned_bytes=share.planned_bytes, used_bytes=share.used_bytes)
            for share in found.memory.shares
        ],
    )
