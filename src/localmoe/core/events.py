"""What happened, for whoever cares.

Parts publish events; observability subscribes. A publisher never waits for a subscriber and never imports
one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec


@dataclass(frozen=True, kw_only=True)
class RequestFinished:
    """A request left the gateway, one way or another. All times in seconds."""

    model: str
    api: str
    """The API family's route, such as `chat.completions`."""
    outcome: str
    """`stop`, `length`, `abort` (the client left) or `error`."""
    prompt_tokens: int
    completion_tokens: int
    time_to_first_token_s: float | None
    """None if no token arrived."""
    inter_token_s: tuple[float, ...]
    queue_s: float | None
    """None if the engine did not say, as when it was interrupted."""
    prefill_s: float | None
    """Likewise."""
    e2e_s: float


@dataclass(frozen=True, kw_only=True)
class HttpAnswered:
    """A request was answered over HTTP, also one that was refused."""

    method: str
    """`other` for those that there are not."""
    route: str
    """The path with names in place of what varies; `other` where there is no such route."""
    status: int
    """499 where the client left before it was answered."""
    duration_s: float
    """Until the answer's end, or the client's."""


class TierState(msgspec.Struct, frozen=True, kw_only=True):
    """Where an engine finds experts that are not all in memory: totals since start."""

    num_experts: int
    """Of all layers together."""
    num_slots: int
    """Experts that fit in RAM."""
    slot_bytes: int
    """RAM that one takes."""
    num_present: int
    """Experts in RAM now."""
    hits: int
    """Uses of an expert, in a layer and step, that found it kept in RAM from an earlier use."""
    misses: int
    """Uses that had it read, ahead or on demand."""
    evictions: int
    prefetches: int
    """Experts read ahead."""
    prefetches_useful: int
    """Of them, used by the layer they were read for, and there in time."""
    prefetches_late: int
    """Used, but still being read when the layer asked."""
    prefetches_wasted: int
    """Not used by the layer they were read for."""
    stall_s: float
    """Time in which there was nothing to do but wait for the disk."""
    disk_reads: int
    disk_bytes: int
    disk_busy_s: float
    """Time in which the disk had something to read."""
    disk_errors: int
    """Reads that failed, or brought something damaged."""
    device_slots: int = 0
    """Experts that fit on the device; 0 where there is none."""
    device_slot_bytes: int = 0
    """Device memory that one takes."""
    num_on_device: int = 0
    """Experts whose place is there now; they are not counted as present in RAM."""
    device_hits: int = 0
    """Uses of an expert that found it there; neither hits nor misses."""
    device_fetches: int = 0
    """Of the hits in RAM, those that the device computed, with a copy for the purpose."""
    device_evictions: int = 0
    copies_in: int = 0
    """Experts copied from RAM to the device, to be used at once or to stay."""
    copies_out: int = 0
    """Experts copied back."""
    copies_busy_s: float = 0.0
    """Sum of the times that copies took."""


class EngineState(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's gauges and running totals, as of its last step. A msgspec struct: workers send it as it is."""

    model: str
    engine: str = ""
    """Its name among those of the model; not known to the engine itself."""
    num_running: int
    num_waiting: int
    kv_blocks_used: int
    kv_blocks_total: int
    prefix_cache_queries: int
    """Prompt tokens looked up since start."""
    prefix_cache_hits: int
    """Prompt tokens found since start."""
    num_preemptions: int
    num_draft_tokens: int
    """Guessed tokens that were run through the model since start (speculative decoding)."""
    num_accepted_tokens: int
    """Those of them that proved right."""
    num_layer_runs: int = 0
    """Layers run since start: those of the model, for each step; 0 where they are not timed, as on a GPU that has
    all experts, which the host waits for once a step."""
    layers_s: float = 0.0
    """Time that this took, waiting for experts included."""
    tiers: TierState | None = None
    """None where all experts are in memory."""

    @classmethod
    def empty(cls, model: str, engine: str) -> "EngineState":
        """Of an engine that is not there."""
        return cls(
            model=model,
            engine=engine,
            num_running=0,
            num_waiting=0,
            kv_blocks_used=0,
            kv_blocks_total=0,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
            num_preemptions=0,
            num_draft_tokens=0,
            num_accepted_tokens=0,
        )


@dataclass(frozen=True, kw_only=True)
class EngineRestarted:
    """An engine died and is being started anew."""

    model: str
    engine: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class QueueChanged:
    """Requests of a model wait for an engine, more or fewer than before."""

    model: str
    num_waiting: int


@dataclass(frozen=True, kw_only=True)
class RequestRefused:
    """A request was not given to any engine."""

    model: str
    reason: str
    """`overloaded`, `unavailable` or `deadline`."""


@dataclass(frozen=True, kw_only=True)
class EngineAnswered:
    """An engine is done with a request."""

    model: str
    engine: str
    outcome: str
    """`complete`, `abort` (the client left, or needed no more), `deadline` or `failed`."""


@dataclass(frozen=True, kw_only=True)
class StreamResumed:
    """Another engine has taken over an answer, with a first chunk."""

    model: str
    engine: str
    """The one that goes on."""
    failed_engine: str
    num_tokens: int
    """That had been generated."""
    gap_s: float
    """Between the last chunk of the one and the first of the other."""


@dataclass(frozen=True, kw_only=True)
class BreakerChanged:
    """An engine gets no requests because it has failed too often, or gets them again."""

    model: str
    engine: str
    is_open: bool


@dataclass(frozen=True, kw_only=True)
class ConfigReloaded:
    """The configuration was read again, changed or put back; or that failed, and all is as it was."""

    is_applied: bool
    version: int | None
    """In effect now, by its number in the history; None where it is not in a file."""


Event = (
    RequestFinished
    | HttpAnswered
    | EngineState
    | EngineRestarted
    | QueueChanged
    | RequestRefused
    | EngineAnswered
    | StreamResumed
    | BreakerChanged
    | ConfigReloaded
)


class EventBus:
    """Calls every subscriber in order, in the publisher's thread; subscribers must be quick."""

    def __init__(self) -> None:
        self._subscribers: list[Callable[[Event], None]] = []

    def subscribe(self, subscriber: Callable[[Event], None]) -> None:
        self._subscribers.append(subscriber)

    def publish(self, event: Event) -> None:
        for subscriber in self._subscribers:
            subscriber(event)
