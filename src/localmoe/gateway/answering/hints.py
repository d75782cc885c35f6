"""Request headers of ours, by which any API says how a request is to be dispatched."""

import time
from dataclasses import dataclass
from typing import Annotated

from fastapi import Header

from localmoe.core.request import PromptSource, Request, SamplingParams
from localmoe.gateway.context import ServedModel

_LEAST_TIME_S = 0.001


@dataclass(frozen=True, kw_only=True)
class DispatchHints:
    """The headers of one request."""

    engine: str | None
    """A kind of engine, or an engine's name; None: any."""
    timeout_s: float | None
    came_s: float
    """By the monotonic clock."""

    def request(
        self,
        request_id: str,
        *,
        model: ServedModel,
        prompt_ids: list[int],
        source: PromptSource | None,
        sampling: SamplingParams,
    ) -> Request:
        """A request to be dispatched so, with the time that is left now."""
        left_s = self.timeout_s
        if left_s is not None:
            left_s = max(_LEAST_TIME_S, left_s - (time.monotonic() - self.came_s))
        return Request(
            id=request_id,
            model=model.id,
            adapter=model.adapter,
            prompt_ids=prompt_ids,
            sampling=sampling,
            source=source,
            engine=self.engine,
            timeout_s=left_s,
        )


async def dispatch_hints(
    x_localmoe_engine: Annotated[
        str | None,
        Header(
            max_length=64,
            description="The kind of engine that is to answer, such as native or vllm, or one engine's name. "
            "Omitted or auto: whichever is best.",
        ),
    ] = None,
    x_localmoe_timeout_s: Annotated[
        float | None,
        Header(
            gt=0,
            le=1e6,
            allow_inf_nan=False,
            description="Seconds within which the answer must be complete, or be refused; at most the server's "
            "own bound.",
        ),
    ] = None,
) -> DispatchHints:
    """The dependency of routes that generate. It is async so that it costs no thread."""
    return DispatchHints(
        engine=None if x_localmoe_engine == "auto" else x_localmoe_engine,
        timeout_s=x_localmoe_timeout_s,
        came_s=time.monotonic(),
    )
