"""What one part needs of another that it may not import."""

from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from localmoe.core.configuration import ConfigOutcome, ConfigState, ConfigVersion, Setting
from localmoe.core.events import TierState
from localmoe.core.inspection import Inspection
from localmoe.core.request import Request, TokenChunk
from localmoe.core.serving import ModelSpec

T = TypeVar("T")


class Generator(Protocol):
    """Anything that answers requests: one engine, or a dispatcher over many."""

    def generate(self, request: Request) -> AsyncGenerator[TokenChunk, None]:
        """Stream the answer. Closing the generator cancels the request and frees what it held.

        Raises:
            BackendUnavailableError: no engine can take it, or the engine died under it.
            EngineFaultError: the engine failed on this request.
        """
        ...

    @property
    def is_ready(self) -> bool:
        """Whether a request would be admitted now."""
        ...


class Inspectable(Protocol):
    """An engine that lets others see what its experts and memory are doing."""

    async def inspect(self) -> Inspection:
        """Everything as of now.

        Raises:
            BackendUnavailableError: there is no engine now, or it is too busy to say.
        """
        ...


class ModelOperations(Protocol):
    """Changes what is served. One change at a time; each returns when it is done, which may take minutes.

    Raises, each of them:
        ConflictError: another change is under way, or names or memory are in the way.
        ModelNotFoundError: there is no such model here.
        ConfigError: an engine is not installed, or cannot be set up so.
        ModelBuildError: what the engine reads could not be made.
        EngineStartError: no engine of the model can start. What was served before still is.
    """

    async def load(self, spec: ModelSpec) -> None:
        """Serve one model more."""
        ...

    async def unload(self, name: str) -> None:
        """Serve a model no more, by any of its names, once its answers are finished."""
        ...

    async def switch(self, name: str | None, spec: ModelSpec) -> None:
        """Serve one model in another's place, under the other's names and its own.

        Args:
            name: the one to replace; None: the only one there is.
        """
        ...


class ConfigOperations(Protocol):
    """The configuration of a server that serves. One change at a time; each is made whole or not at all.

    Raises, the changes:
        ConfigError: what is to be is wrong; the message names the setting or the file.
        StorageError: a file or the history cannot be written.
        ConflictError: another change is under way, or something goes before what the file says.
        What `ModelOperations` raises, where models are concerned.
    """

    def state(self) -> ConfigState:
        """All settings."""
        ...

    def setting(self, key: str) -> Setting:
        """One setting, or a block of them. Raises SettingNotFoundError."""
        ...

    async def versions(self, limit: int) -> Sequence[ConfigVersion]:
        """What was in effect, the latest first. Raises StorageError."""
        ...

    async def set(
        self, key: str, value: Any, *, if_match: str | None, author: str, reason: str
    ) -> tuple[ConfigOutcome, Setting]:
        """Change a setting, or some of a block, and say what it is now.

        Args:
            if_match: the tag that it must have; None or `*`: any.

        Raises:
            SettingNotFoundError: there is none of this name.
            PreconditionError: it has another tag.
        """
        ...

    async def reload(self, *, author: str, reason: str) -> ConfigOutcome:
        """Read the files again, and apply what differs."""
        ...

    async def rollback(self, number: int, *, author: str, reason: str) -> ConfigOutcome:
        """Put a version back. Raises VersionNotFoundError."""
        ...


@dataclass(frozen=True, kw_only=True)
class ResourceUse:
    """What is used of a machine or of some GPUs; of several, the worst."""

    memory_share: float
    """Of the memory, 0 to 1."""
    busy_share: float
    """Of the computing time lately, 0 to 1."""
    temperature_c: float | None = None
    """None where it is not known."""


class ResourceMeter(Protocol):
    """Looks at the hardware from time to time."""

    def resources(self, devices: Sequence[int]) -> ResourceUse:
        """What was used when it looked last: of these GPUs, or of the machine where there are none. At once."""
        ...


@dataclass(frozen=True, kw_only=True)
class Routed(Generic[T]):
    """A layer's tokens on the way to their experts."""

    layer: int
    h_TD: T
    """[T, D] float32, what experts compute with."""
    ids_TK: T
    """[T, K] int32, the experts chosen, the likeliest first; -1 where nothing is to be computed for a place."""
    weights_TK: T
    """[T, K] float32."""
    ahead: Sequence[Callable[[T], T]]
    """One for each layer that follows: makes of the hidden state, as it is before this layer's experts, the ids
    [T, K] that the layer would choose. Of the next layer they are mostly right, of later ones less and less."""


class TokenMatcher(Protocol):
    """Follows one answer through its grammar, token by token. What may come depends on what has come alone.

    Raises, each method:
        EngineFaultError: the answer cannot go on; from then on always.
    """

    @property
    def is_complete(self) -> bool:
        """Whether nothing may follow."""
        ...

    def take(self, token_ids: Sequence[int]) -> None:
        """Go on after these, which may come; not after a stop token, with which an answer ends."""
        ...

    def count_viable(self, draft_ids: Sequence[int]) -> int:
        """How many of these, from the first on, may come without completing the answer. Takes none of them."""
        ...

    def allowed(self, draft_ids: Sequence[int]) -> list[bytes]:
        """What may come next, and then after each of these, which are viable: a bit for each token id, those of a
        byte from the lowest up. One is set at least. Takes none of them."""
        ...


class ExpertExecutor(Protocol[T]):
    """Computes the routed experts of a model, wherever their weights are."""

    def begin_step(self, is_prompt_T: Sequence[bool]) -> None:
        """A step begins; says of each of its tokens whether it is one of a prompt."""
        ...

    def state(self) -> TierState | None:
        """Where experts were found so far; None where all are in memory."""
        ...

    def __call__(self, routed: Routed[T], x_TD: T) -> None:
        """Add `sum over k of weights[t, k] * expert[ids[t, k]](h[t])` to the hidden state x, float32, in place."""
        ...


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Of what was measured several times."""

    count: int
    sum: float
    mean: float
    min: float
    max: float


class PerformanceStats(Protocol):
    """Remembers what answers took."""

    def summaries(self, window_s: float, model: str | None) -> dict[str, Summary]:
        """Of the answers finished in the last so many seconds, by what was measured; the name has the unit. Nothing
        of what there was none of.

        Args:
            model: of this one only; None: of all.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class MemoryLeft:
    """Of the machine, or of one GPU."""

    name: str
    """`ram`, or `gpu0` and so on."""
    total_bytes: int
    available_bytes: int


class MemoryMeter(Protocol):
    """Looks at memory when asked."""

    def memory(self) -> Sequence[MemoryLeft]:
        """RAM first, as a control group allows it, then GPUs."""
        ...


class ResponseStore(Protocol):
    """Keeps answers that clients may ask for again, or go on from. What is kept is nobody's business but its owner's.

    Raises, each of them:
        StorageError: it cannot be kept, or read.
    """

    async def put(self, owner: str, response_id: str, data: bytes) -> None:
        """Keep it, in place of what was kept under this id."""
        ...

    async def get(self, owner: str, response_id: str) -> bytes | None:
        """What is kept; None: nothing, or no more."""
        ...

    async def delete(self, owner: str, response_id: str) -> bool:
        """Keep it no more; False: there was nothing."""
        ...
