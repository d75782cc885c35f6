"""Runs jobs: takes items from the store, puts them to the application, and records what came of it.

One task leads. It takes as many items as there are places, starts a task for each, and takes more when one ends;
meanwhile it keeps the leases, and lets go of items whose lease is lost, as after a client has cancelled the job.
Files of batches are read and written by one more task, one batch at a time. Nothing is remembered here that is not
in the store, so whatever ends this process, another one goes on. A store that cannot be reached, or whose disk is
full, is waited for: answers that could not be recorded are kept until they can.
"""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from starlette.types import ASGIApp

from localmoe.core.errors import StorageError
from localmoe.core.jobs import (
    ItemLease,
    ItemResult,
    ItemState,
    Job,
    JobState,
    JobWork,
    LeasedItem,
    LineError,
    Setback,
)
from localmoe.gateway.errors import INTERNAL_ERROR, ApiError
from localmoe.gateway.jobs.batches import BatchFiles
from localmoe.gateway.jobs.config import JobsConfig
from localmoe.gateway.jobs.requests import InProcessClient, Reply

logger = logging.getLogger(__name__)

_POLL_S = 1.0
"""How long until work is found that another gateway has put there, or that was put back."""
_MAX_PAUSE_S = 30.0
_COMPLAINT_INTERVAL_S = 60.0
_FIRST_RETRY_S, _MAX_RETRY_S = 0.25, 60.0
_MAX_REST_S = 1.0
"""How long a place is left free after a refusal, since what comes next would most likely be refused, too."""
_BATCH_RETRY_S = 15.0
_MAX_NOT_SERVED, _MAX_NOT_SERVED_BESIDE_OTHERS = 5, 20
"""How often a gateway may find that it does not serve an item's model before nobody does. Those that are at work may
have no place for it yet; those of which nothing is seen need not be there."""

_UNREADABLE = LineError(code="server_error", message="the server failed to read the file; its log says why")
_MAY_NOT_ASK = ApiError(
    status=401,
    message="this was asked for with an API key that was revoked, or has expired, before there was room for it",
    code="invalid_api_key",
)

K = TypeVar("K")
T = TypeVar("T")


class JobRunner:
    """Runs the jobs of one store.

    Args:
        work: the store.
        files: of batches.
        name: of this runner; no other has it at the same time, and its successor after a restart should.
    """

    def __init__(self, work: JobWork, files: BatchFiles, *, config: JobsConfig, name: str) -> None:
        self._work = work
        self._files = files
        self._config = config
        self._name = name
        self._client: InProcessClient | None = None
        self._leader: asyncio.Task[None] | None = None
        self._items: dict[ItemLease, asyncio.Task[None]] = {}
        self._batches: dict[str, asyncio.Task[None]] = {}
        """Whose files are being read or written, by id; one at most."""
        self._has_news = asyncio.Event()
        self._complaints: dict[str, float] = {}
        """And until when none is made again."""
        self._next_look_s = 0.0

    def start(self, app: ASGIApp) -> None:
        """Begin; requests are put to this application."""
        self._client = InProcessClient(app, max_answer_bytes=self._config.max_answer_bytes)
        self._leader = asyncio.create_task(self._lead())

    async def stop(self) -> None:
        """End; what is under way is done again by whoever comes next."""
        if self._leader is None:
            return
        self._leader.cancel()  # first, so that it begins nothing more
        await asyncio.gather(self._leader, return_exceptions=True)
        tasks = [*self._batches.values(), *self._items.values()]
        for task in tasks:
            self._cancel(task)
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            await self._work.release(self._name, interrupted=False)
        except StorageError as error:
            logger.warning("jobs under way could not be given back, and are taken up later: %s", error)

    def wake(self) -> None:
        """There is work, or less of it: look at once."""
        self._has_news.set()

    def cancelled(self, job_id: str) -> None:
        """End what is under way of a job that the store knows to be cancelled."""
        for lease, task in self._items.items():
            if lease[0] == job_id:
                self._cancel(task)
        self.wake()

    async def _lead(self) -> None:
        has_released = False
        pause_s = _POLL_S
        while True:
            self._has_news.clear()
            try:
                if not has_released:  # what an earlier one of this name had under way
                    await self._work.release(self._name, interrupted=True)
                    has_released = True
                await self._take_work()
                pause_s = _POLL_S
            except StorageError as error:
                self._complain("jobs", error)
                pause_s = min(_MAX_PAUSE_S, 2 * pause_s)
            except Exception:  # a fault of ours must not end all jobs
                logger.exception("jobs wait")
                pause_s = _MAX_PAUSE_S
            if pause_s > _POLL_S:
                await asyncio.sleep(pause_s)
            else:
                await self._wait_for_news()

    async def _wait_for_news(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_POLL_S):
                await self._has_news.wait()

    async def _take_work(self) -> None:
        lease_s = self._config.lease_s
        if time.monotonic() >= self._next_look_s:
            self._next_look_s = time.monotonic() + lease_s / 3
            await self._keep_leases()
            await self._work.look_after(
                keep_ended_s=self._config.keep_ended_s, max_owner_bytes=self._config.max_owner_file_bytes
            )
            await self._files.folder.sweep()
        if (free := self._config.max_running - len(self._items)) > 0:
            for item in await self._work.lease_items(self._name, limit=free, lease_s=lease_s):
                self._begin(self._items, item.lease, self._run(item))
        if not self._batches and (job := await self._work.lease_job(self._name, lease_s=lease_s)):
            self._begin(self._batches, job.id, self._advance(job))

    def _begin(self, tasks: dict[K, asyncio.Task[None]], key: K, work: Coroutine[Any, Any, None]) -> None:
        def ended(task: asyncio.Task[None]) -> None:
            del tasks[key]
            self.wake()
            if not task.cancelled() and (error := task.exception()) is not None:
                # Its lease is given back when leases are renewed.
                logger.error("%s failed", key, exc_info=error)

        tasks[key] = asyncio.create_task(work)
        tasks[key].add_done_callback(ended)

    async def _keep_leases(self) -> None:
        before = set(self._items)
        held = await self._work.renew(
            self._name, items=before, job_ids=list(self._batches), lease_s=self._config.lease_s
        )
        for lease in before - held:
            if (task := self._items.get(lease)) is not None:
                self._cancel(task)

    @staticmethod
    def _cancel(task: asyncio.Task[None]) -> None:
        if not task.cancelling():  # a second time would break off what the first one cleans up
            task.cancel()

    async def _run(self, item: LeasedItem) -> None:
        """One item, to its end."""
        request_id = f"{item.job_id}-{item.position}-{item.num_starts}"
        try:
            async with asyncio.timeout(max(0.0, item.time_left_s)):
                reply = await self._ask(item, request_id)
        except TimeoutError:
            return  # it expires, which the store sees by itself
        setback = reply.setback
        if setback is not None and not (setback is Setback.NOT_SERVED and _is_served_nowhere(item)):
            num_earlier = item.num_not_served if setback is Setback.NOT_SERVED else item.num_starts - 1
            delay_s = min(_MAX_RETRY_S, max(reply.retry_after_s, _FIRST_RETRY_S * 2.0 ** min(num_earlier, 10)))
            delay_s *= random.uniform(0.75, 1.25)  # so that not all come back at once
            await self._insist(
                lambda: self._work.put_back(item, runner=self._name, delay_s=delay_s, because=setback)
            )
            await asyncio.sleep(min(delay_s, _MAX_REST_S))
            return
        result = ItemResult(
            position=item.position,
            custom_id=None,
            state=ItemState.SUCCEEDED if reply.status < 400 else ItemState.FAILED,
            status_code=reply.status,
            request_id=reply.request_id,
            body=reply.body,
        )
        if not await self._insist(lambda: self._work.finish(item, result, runner=self._name)):
            logger.info("the answer to %s came too late and is dropped", request_id)

    async def _ask(self, item: LeasedItem, request_id: str) -> Reply:
        assert self._client is not None
        if not item.may_ask:
            return Reply(status=_MAY_NOT_ASK.status, body=_MAY_NOT_ASK.body(), request_id=request_id)
        try:
            return await self._client.post(item.endpoint, item.body, owner=item.owner, request_id=request_id)
        except Exception:
            logger.exception("request %s failed", request_id)
            return Reply(status=INTERNAL_ERROR.status, body=INTERNAL_ERROR.body(), request_id=request_id)

    async def _advance(self, job: Job) -> None:
        """Read a batch's file, or write those with its answers. What cannot be done now is tried again later, and
        other batches come first."""
        try:
            if job.state is JobState.VALIDATING:
                await self._files.read(job, runner=self._name)
            else:
                await self._files.write(job, runner=self._name)
            return
        except StorageError as error:
            self._complain(f"files of batch {job.id}", error)
        except Exception:
            logger.exception("batch %s: its files cannot be read or written", job.id)
            if job.state is JobState.VALIDATING:
                await self._insist(lambda: self._work.reject(job.id, [_UNREADABLE], runner=self._name))
                return
            # What was answered is not to be lost.
        await self._insist(lambda: self._work.give_back(job.id, runner=self._name, delay_s=_BATCH_RETRY_S))

    async def _insist(self, step: Callable[[], Awaitable[T]]) -> T:
        """Carry out a step of the store's as soon as it can be."""
        pause_s = _POLL_S
        while True:
            try:
                return await step()
            except StorageError as error:
                self._complain("jobs", error)
            await asyncio.sleep(pause_s)
            pause_s = min(_MAX_PAUSE_S, 2 * pause_s)

    def _complain(self, what: str, error: StorageError) -> None:
        """Of the same now and then: every item that waits meets it again and again."""
        now_s, complaint = time.monotonic(), f"{what} wait: {error}"
        self._complaints = {text: until_s for text, until_s in self._complaints.items() if until_s > now_s}
        if complaint not in self._complaints:
            self._complaints[complaint] = now_s + _COMPLAINT_INTERVAL_S
            logger.warning(complaint)


def _is_served_nowhere(item: LeasedItem) -> bool:
    return item.num_not_served >= (_MAX_NOT_SERVED_BESIDE_OTHERS if item.others_run else _MAX_NOT_SERVED)
