"""Measures an engine once when it has started, so that its first requests need not find out how fast it is."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import aclosing

from localmoe.core.errors import LocalMoEError
from localmoe.core.request import PromptSource, Request, SamplingParams
from localmoe.dispatch.pace import Pace
from localmoe.dispatch.replica import Replica

logger = logging.getLogger(__name__)

_PROBES = ((16, 12), (16, 12), (256, 1))
"""(prompt tokens, tokens to generate): one that mostly decodes, one that mostly computes a prompt. The first is not
timed: an engine compiles and allocates for its first answer."""


async def probe(replica: Replica, model: str, clock: Callable[[], float], *, timeout_s: float) -> None:
    """Have an engine answer something short and something long, each in time. Does nothing to its breaker."""
    for number, (num_prompt_tokens, max_tokens) in enumerate(_PROBES):
        request = Request(
            id="probe",
            model=model,
            # Whatever they mean: any model has tokens of these ids, and no prompt begins like this.
            prompt_ids=[1 + (index * 7 + max_tokens) % 97 for index in range(num_prompt_tokens)],
            sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
            source=PromptSource(text="a " * num_prompt_tokens),
        )
        if replica.backend.refusal(request) is not None:
            return
        replica.num_running += 1
        pace = Pace(replica, request, known_tokens=0, num_beside=lambda: 0, clock=clock)
        try:
            async with asyncio.timeout(timeout_s), aclosing(replica.backend.generate(request)) as chunks:
                async for chunk in chunks:
                    if number:
                        pace.take(chunk)
        except Exception as error:  # whatever it is: the other engines have to be started
            foreseen = isinstance(error, LocalMoEError | TimeoutError)
            reason = str(error) or f"it took more than {timeout_s:g} s"
            logger.warning("%s: %s could not be measured: %s", model, replica.name, reason, exc_info=not foreseen)
            return
        finally:
            pace.end()
            replica.num_running -= 1
