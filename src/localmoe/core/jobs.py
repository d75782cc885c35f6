"""Work that is done later, and the files it is made of: what is kept of them, and what keeps it.

A job has items, each a request to one of our own endpoints: one of an asynchronous request, many of a batch. An
item is run by whoever has its lease; its end is recorded together with its result, by the lease's holder only, so
that it ends once however often it was begun.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from localmoe.core.identity import Principal


class JobKind(StrEnum):
    """What a client asked for."""

    INFERENCE = "inference"
    """One request, answered later."""
    BATCH = "batch"
    """A file of requests, answered in a file."""


class JobState(StrEnum):
    """In the words of OpenAI's batches."""

    VALIDATING = "validating"
    """A batch whose file is being read."""
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    """All items have ended; the answers are being written to files. Likewise the two that follow."""
    CANCELLING = "cancelling"
    EXPIRING = "expiring"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


ENDED = frozenset({JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED, JobState.EXPIRED})
"""Nothing happens to such a job any more."""


class ItemState(StrEnum):
    """Of one request of a job."""

    QUEUED = "queued"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """Answered with an error."""
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class Setback(StrEnum):
    """Why an item was put back."""

    REFUSED = "refused"
    """There was no room for it."""
    INTERRUPTED = "interrupted"
    """An engine ended while it worked on the item, which may be why."""
    NOT_SERVED = "not_served"
    """Its model is not served by the gateway that has asked."""


@dataclass(frozen=True, kw_only=True)
class LineError:
    """What is wrong with a batch's file."""

    code: str
    message: str
    line: int | None = None
    """From 1; None: with the whole of it."""
    param: str | None = None


@dataclass(frozen=True, kw_only=True)
class Job:
    """As it is now. Times are Unix times in seconds."""

    id: str
    kind: JobKind
    owner: Principal
    """Whoever asked for it, as they were then; its items are run in their name."""
    endpoint: str
    """The path that the items are sent to."""
    state: JobState
    created_at: float
    expires_at: float
    """What has not ended by then never does."""
    in_progress_at: float | None = None
    finalizing_at: float | None = None
    cancelling_at: float | None = None
    ended_at: float | None = None
    num_bytes: int = 0
    """Of its requests, which are kept until they have been answered; of an asynchronous request that has ended, of
    its result."""
    num_items: int = 0
    num_succeeded: int = 0
    num_failed: int = 0
    input_file_id: str | None = None
    """Of batches, as all that follows."""
    output_file_id: str | None = None
    """Answers; there once the job has ended, if there are any."""
    error_file_id: str | None = None
    """Likewise errors."""
    output_lifetime_s: int | None = None
    """For how long these files are kept; None: as long as others."""
    completion_window: str | None = None
    metadata: dict[str, str] | None = None
    errors: tuple[LineError, ...] = ()
    """Why its file was not taken."""


@dataclass(frozen=True, kw_only=True)
class NewItem:
    """One request of a job."""

    position: int
    """In the job, from 0."""
    custom_id: str | None
    """The client's own name for it, in a batch."""
    body: bytes
    """The request's, JSON."""


ItemLease = tuple[str, int, int]
"""Names a lease: job, position in it, and how often the item was begun."""


@dataclass(frozen=True, kw_only=True)
class LeasedItem:
    """An item that one runner, and nobody else, is to run now."""

    job_id: str
    position: int
    num_starts: int
    """How often it was begun, this time included."""
    num_not_served: int
    """How often it was put back because a gateway did not serve its model, since one did last."""
    others_run: bool
    """Whether other runners have items under way."""
    owner: Principal
    may_ask: bool
    """Whether the owner still may: not where they had API keys, and none of them is valid any more."""
    endpoint: str
    body: bytes
    time_left_s: float
    """Until its job expires."""

    @property
    def lease(self) -> ItemLease:
        """The name of the lease."""
        return self.job_id, self.position, self.num_starts


@dataclass(frozen=True, kw_only=True)
class ItemResult:
    """One request of a job and what became of it."""

    position: int
    custom_id: str | None
    state: ItemState
    status_code: int | None = None
    """The HTTP status it was answered with; None: it was not, or not by HTTP's means."""
    request_id: str | None = None
    body: bytes = b""
    """The answer, JSON; empty where there is none."""


class JobStore(Protocol):
    """Keeps jobs. Every method raises StorageError where that cannot be done now."""

    async def add(self, job: Job, items: Sequence[NewItem], *, max_open: int, max_open_bytes: int) -> None:
        """Keep a new job; its items can be run from now on.

        Args:
            max_open: jobs that the owner may have that have not ended.
            max_open_bytes: of the requests of those together.

        Raises:
            QuotaExceededError: there are so many already.
        """
        ...

    async def get(self, job_id: str, *, kind: JobKind, owner_id: str | None) -> Job | None:
        """A job of this owner, or of any; None: there is none."""
        ...

    async def page(self, *, kind: JobKind, owner_id: str | None, after: str | None, limit: int) -> list[Job]:
        """The newest first, beginning behind the job of id `after`.

        Raises:
            InvalidRequestError: that is none of these.
        """
        ...

    async def result(self, job_id: str) -> ItemResult | None:
        """The first item, which is the only one of an asynchronous request."""
        ...

    async def cancel(self, job_id: str) -> None:
        """End what has not ended. Who runs one of the items learns it when the lease is renewed."""
        ...

    async def delete(self, job_id: str) -> None:
        """Forget a job that has ended."""
        ...


class JobWork(Protocol):
    """What those who run jobs need. `runner` is the name of one that no other has at the same time. Every method
    raises StorageError where it cannot be done now."""

    async def lease_items(self, runner: str, *, limit: int, lease_s: float) -> list[LeasedItem]:
        """Take items to run, those of different owners in turn. What the runner was the last to find that it does not
        serve is left to others, where there seem to be any."""
        ...

    async def finish(self, item: LeasedItem, result: ItemResult, *, runner: str) -> bool:
        """Record the end of an item, and of its job if it was the last. False: the lease was lost, and nothing is
        recorded."""
        ...

    async def put_back(self, item: LeasedItem, *, runner: str, delay_s: float, because: Setback) -> None:
        """Let an item be run later. One that was interrupted too often, as by the end of its runner, has failed."""
        ...

    async def renew(
        self, runner: str, *, items: Collection[ItemLease], job_ids: Collection[str], lease_s: float
    ) -> set[ItemLease]:
        """Keep the leases of what is under way, and give back what else the runner holds: it may have been given
        what it never heard of.

        Returns:
            Of these items those that are still held.
        """
        ...

    async def release(self, runner: str, *, interrupted: bool) -> None:
        """Give back all leases of a runner.

        Args:
            interrupted: it ended without doing so, and what it ran may be why.
        """
        ...

    async def look_after(self, *, keep_ended_s: float, max_owner_bytes: int) -> None:
        """Put back what a runner that is gone has held, end what has expired, forget what ended long ago, and of an
        owner's results of asynchronous requests the oldest, where they take more than this together."""
        ...

    async def lease_job(self, runner: str, *, lease_s: float) -> Job | None:
        """Take a job of which something is to be done that is no item: its file to be read, or to be written."""
        ...

    async def give_back(self, job_id: str, *, runner: str, delay_s: float) -> None:
        """Let such a job be taken again later, as it is."""
        ...

    async def add_items(self, job_id: str, items: Sequence[NewItem], *, runner: str) -> bool:
        """Add to a job that is being read; those that it has already are left alone. False: the lease was lost."""
        ...

    async def begin(self, job_id: str, *, num_items: int, runner: str) -> None:
        """All items of a job are there."""
        ...

    async def reject(self, job_id: str, errors: Sequence[LineError], *, runner: str) -> None:
        """A job's file cannot be taken; it has failed, and nothing of it is run."""
        ...

    async def results(self, job_id: str, *, after: int, limit: int) -> list[ItemResult]:
        """Items behind this position, in order."""
        ...

    async def close(
        self, job_id: str, *, output: "FileRecord | None", errors: "FileRecord | None", runner: str
    ) -> bool:
        """End a job whose answers are in these files, and keep the files. False: the lease was lost."""
        ...


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file that somebody keeps here. Times are Unix times in seconds."""

    id: str
    owner_id: str
    filename: str
    purpose: str
    num_bytes: int
    created_at: float
    expires_at: float | None = None
    """None: never."""


@dataclass(frozen=True, kw_only=True)
class FileQuery:
    """Which files, in which order."""

    owner_id: str | None
    """None: of anybody."""
    purpose: str | None = None
    after: str | None = None
    """Behind the file of this id."""
    limit: int = 100
    newest_first: bool = True


class FileStore(Protocol):
    """Keeps what is known of files; their contents are elsewhere. Every method raises StorageError where that cannot
    be done now."""

    async def add(self, record: FileRecord, *, max_owner_bytes: int) -> None:
        """Keep a record.

        Raises:
            QuotaExceededError: the owner's files would be larger than this together, or are too many.
        """
        ...

    async def get(self, file_id: str, *, owner_id: str | None) -> FileRecord | None:
        """A file of this owner, or of any, that has not expired; None: there is none."""
        ...

    async def page(self, query: FileQuery) -> list[FileRecord]:
        """Those that have not expired.

        Raises:
            InvalidRequestError: that which they are to be behind is none of these.
        """
        ...

    async def delete(self, file_id: str) -> None:
        """Forget a record."""
        ...

    async def num_bytes(self, owner_id: str) -> int:
        """Size of the owner's files together."""
        ...

    async def delete_expired(self) -> list[str]:
        """Forget files whose time is over; returns their ids."""
        ...

    async def known(self, file_ids: Collection[str]) -> set[str]:
        """Which of these there are."""
        ...
