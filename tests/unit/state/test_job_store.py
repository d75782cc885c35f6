"""Jobs in the store: leases, ends, turns."""

import asyncio
import time
from dataclasses import replace

import pytest
from sqlalchemy import text, update

from localmoe.core.errors import InvalidRequestError, QuotaExceededError
from localmoe.core.identity import Principal, Role
from localmoe.core.jobs import (
    FileQuery,
    FileRecord,
    ItemResult,
    ItemState,
    Job,
    JobKind,
    JobState,
    LeasedItem,
    LineError,
    NewItem,
    Setback,
)
from localmoe.core.keys import KeyRecord
from localmoe.state import files as files_module
from localmoe.state.database import Database
from localmoe.state.files import SqlFileStore
from localmoe.state.job_work import SqlJobWork
from localmoe.state.jobs import SqlJobStore
from localmoe.state.keys import SqlKeyStore
from localmoe.state.schema import jobs as jobs_table

ANNA = Principal(id="anna", name="Anna", role=Role.USER, models=("tiny",))
BERT = Principal(id="bert", name="Bert", role=Role.USER)


def single(job_id: str, owner: Principal = ANNA) -> tuple[Job, list[NewItem]]:
    now_s = time.time()
    job = Job(
        id=job_id,
        kind=JobKind.INFERENCE,
        owner=owner,
        endpoint="/v1/inference",
        state=JobState.IN_PROGRESS,
        created_at=now_s,
        expires_at=now_s + 100,
        in_progress_at=now_s,
        num_bytes=100,
        num_items=1,
    )
    return job, [NewItem(position=0, custom_id=None, body=b'{"a":1}')]


def batch(job_id: str, owner: Principal = ANNA) -> Job:
    now_s = time.time()
    return Job(
        id=job_id,
        kind=JobKind.BATCH,
        owner=owner,
        endpoint="/v1/completions",
        state=JobState.VALIDATING,
        created_at=now_s,
        expires_at=now_s + 100,
        input_file_id="file-1",
        completion_window="24h",
        metadata={"a": "b"},
    )


def items(first: int, number: int) -> list[NewItem]:
    return [NewItem(position=first + i, custom_id=f"c{first + i}", body=b"{}") for i in range(number)]


def answered(item: LeasedItem, state: ItemState = ItemState.SUCCEEDED) -> ItemResult:
    status = 200 if state is ItemState.SUCCEEDED else 400
    return ItemResult(
        position=item.position, custom_id=None, state=state, status_code=status, request_id="r", body=b'{"b":2}'
    )


@pytest.fixture
def store(database: Database) -> SqlJobStore:
    return SqlJobStore(database)


@pytest.fixture
def work(database: Database) -> SqlJobWork:
    return SqlJobWork(database)


async def started_batch(
    store: SqlJobStore, work: SqlJobWork, job_id: str, number: int, owner: Principal = ANNA
) -> None:
    await store.add(batch(job_id, owner), [], max_open=10, max_open_bytes=1000)
    assert (await work.lease_job("reader", lease_s=30)) is not None
    assert await work.add_items(job_id, items(0, number), runner="reader")
    await work.begin(job_id, num_items=number, runner="reader")


async def job(store: SqlJobStore, job_id: str, kind: JobKind = JobKind.INFERENCE) -> Job:
    found = await store.get(job_id, kind=kind, owner_id=None)
    assert found is not None
    return found


async def test_a_single_job_from_beginning_to_end(store: SqlJobStore, work: SqlJobWork) -> None:
    added, its_items = single("job_1")
    await store.add(added, its_items, max_open=10, max_open_bytes=1000)
    assert await job(store, "job_1") == added
    (item,) = await work.lease_items("me", limit=5, lease_s=30)
    assert (item.owner, item.endpoint, item.body, item.num_starts) == (ANNA, "/v1/inference", b'{"a":1}', 1)
    assert await work.lease_items("other", limit=5, lease_s=30) == []
    assert await work.finish(item, answered(item), runner="me")
    ended = await job(store, "job_1")
    assert (ended.state, ended.num_succeeded, ended.num_failed) == (JobState.COMPLETED, 1, 0)
    assert ended.ended_at is not None
    result = await store.result("job_1")
    assert result is not None
    assert (result.state, result.status_code, result.body) == (ItemState.SUCCEEDED, 200, b'{"b":2}')


async def test_a_failed_item_is_a_failed_job(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    (item,) = await work.lease_items("me", limit=1, lease_s=30)
    await work.finish(item, answered(item, ItemState.FAILED), runner="me")
    assert (await job(store, "job_1")).state is JobState.FAILED


async def test_jobs_are_their_owners(store: SqlJobStore) -> None:
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    assert await store.get("job_1", kind=JobKind.INFERENCE, owner_id="bert") is None
    assert await store.get("job_1", kind=JobKind.BATCH, owner_id="anna") is None
    assert await store.get("job_1", kind=JobKind.INFERENCE, owner_id="anna") is not None
    assert await store.page(kind=JobKind.INFERENCE, owner_id="bert", after=None, limit=5) == []


async def test_open_jobs_are_bounded_for_each_owner(store: SqlJobStore) -> None:
    for number in range(3):
        await store.add(*single(f"job_{number}"), max_open=3, max_open_bytes=1000)
    with pytest.raises(QuotaExceededError, match="3 may be open"):
        await store.add(*single("job_3"), max_open=3, max_open_bytes=1000)
    await store.cancel("job_0")
    await store.add(*single("job_3"), max_open=3, max_open_bytes=1000)
    await store.add(*single("job_4", BERT), max_open=3, max_open_bytes=1000)


async def test_what_open_jobs_take_is_bounded_for_each_owner(store: SqlJobStore) -> None:
    for number in range(2):
        await store.add(*single(f"job_{number}"), max_open=10, max_open_bytes=250)
    with pytest.raises(QuotaExceededError, match="300 bytes with this; 250 may"):
        await store.add(*single("job_2"), max_open=10, max_open_bytes=250)
    await store.add(*single("job_3", BERT), max_open=10, max_open_bytes=250)
    await store.cancel("job_0")
    await store.add(*single("job_2"), max_open=10, max_open_bytes=250)


async def test_pages_follow_each_other(store: SqlJobStore) -> None:
    added = [f"job_{number}" for number in range(7)]
    for job_id in added:
        await store.add(*single(job_id), max_open=10, max_open_bytes=1000)
    seen: list[str] = []
    while found := await store.page(
        kind=JobKind.INFERENCE, owner_id="anna", after=seen[-1] if seen else None, limit=3
    ):
        seen += [one.id for one in found]
    assert seen == added[::-1]
    await store.add(*single("job_of_bert", BERT), max_open=10, max_open_bytes=1000)
    for after in ("nobody", "job_of_bert"):
        with pytest.raises(InvalidRequestError, match=after):
            await store.page(kind=JobKind.INFERENCE, owner_id="anna", after=after, limit=3)
    with pytest.raises(InvalidRequestError):
        await store.page(kind=JobKind.BATCH, owner_id="anna", after="job_1", limit=3)


async def test_an_item_is_leased_once_by_many_runners(store: SqlJobStore, work: SqlJobWork) -> None:
    await started_batch(store, work, "batch_1", 40)

    async def take(runner: str) -> list[int]:
        taken: list[int] = []
        while got := await work.lease_items(runner, limit=3, lease_s=30):
            taken += [item.position for item in got]
        return taken

    taken = await asyncio.gather(*(take(f"r{number}") for number in range(5)))
    assert sorted(position for some in taken for position in some) == list(range(40))


async def test_a_lost_lease_records_nothing(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    (first,) = await work.lease_items("slow", limit=1, lease_s=-1)
    await work.look_after(keep_ended_s=1000, max_owner_bytes=1000)
    (second,) = await work.lease_items("fast", limit=1, lease_s=30)
    assert second.num_starts == 2
    assert not await work.finish(first, answered(first), runner="slow")
    assert (await job(store, "job_1")).state is JobState.IN_PROGRESS
    assert await work.finish(second, answered(second), runner="fast")
    assert not await work.finish(second, answered(second), runner="fast")
    assert (await job(store, "job_1")).num_succeeded == 1


async def test_the_same_runner_does_not_end_an_earlier_start(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    (first,) = await work.lease_items("me", limit=1, lease_s=30)
    await work.release("me", interrupted=True)
    (second,) = await work.lease_items("me", limit=1, lease_s=30)
    assert not await work.finish(first, answered(first), runner="me")
    assert await work.finish(second, answered(second), runner="me")


async def test_leases_are_kept_while_renewed(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    (item,) = await work.lease_items("me", limit=1, lease_s=-1)
    running = [item.lease, ("job_9", 0, 1)]
    assert await work.renew("me", items=running, job_ids=[], lease_s=30) == {("job_1", 0, 1)}
    await work.look_after(keep_ended_s=1000, max_owner_bytes=1000)
    assert await work.lease_items("other", limit=1, lease_s=30) == []
    await store.cancel("job_1")
    assert await work.renew("me", items=running, job_ids=[], lease_s=30) == set()


async def test_what_a_runner_has_never_heard_of_is_given_back(store: SqlJobStore, work: SqlJobWork) -> None:
    """As when the answer to asking for it was lost."""
    for number in range(2):
        await store.add(*single(f"job_{number}"), max_open=10, max_open_bytes=1000)
    for number in range(2):
        await store.add(batch(f"batch_{number}"), [], max_open=10, max_open_bytes=1000)
    known, unknown = await work.lease_items("me", limit=2, lease_s=30)
    for number in range(2):
        assert (await work.lease_job("me", lease_s=30)).id == f"batch_{number}"  # type: ignore[union-attr]
    assert await work.renew("me", items=[known.lease], job_ids=["batch_0"], lease_s=30) == {known.lease}
    assert [item.job_id for item in await work.lease_items("other", limit=9, lease_s=30)] == [unknown.job_id]
    assert (await work.lease_job("other", lease_s=30)).id == "batch_1"  # type: ignore[union-attr]
    assert await work.lease_job("other", lease_s=30) is None
    assert await work.finish(known, answered(known), runner="me")
    assert not await work.finish(unknown, answered(unknown), runner="me")


async def test_what_was_refused_comes_later(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    (item,) = await work.lease_items("me", limit=1, lease_s=30)
    await work.put_back(item, runner="me", delay_s=1000, because=Setback.REFUSED)
    assert await work.lease_items("me", limit=1, lease_s=30) == []
    async with work._database.write() as connection:
        await connection.execute(text("UPDATE job_items SET due_at = 0"))
    (again,) = await work.lease_items("me", limit=1, lease_s=30)
    assert again.num_starts == 2


async def test_refusals_are_no_reason_to_give_up(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    leases = set()
    for _ in range(8):
        (item,) = await work.lease_items("me", limit=1, lease_s=30)
        leases.add(item.lease)
        await work.put_back(item, runner="me", delay_s=-1, because=Setback.REFUSED)
    assert len(leases) == 8, "no two are taken for each other"
    assert len(await work.lease_items("me", limit=1, lease_s=30)) == 1
    await work.release("me", interrupted=True)
    assert (await job(store, "job_1")).state is JobState.IN_PROGRESS


@pytest.mark.parametrize(
    ("keys", "may_ask"),
    [
        ([], True),  # a token's owner, or anybody
        ([(None, None)], True),
        ([(None, 1.0)], False),
        ([(1.0, None)], False),
        ([(1.0, None), (None, 2.0)], False),
        ([(None, 1.0), (None, None)], True),  # the key was replaced
        ([(None, 4e9)], True),
    ],
)
async def test_whose_keys_are_gone_asks_no_more(
    store: SqlJobStore,
    work: SqlJobWork,
    database: Database,
    keys: list[tuple[float | None, float | None]],
    may_ask: bool,
) -> None:
    of_others = [("bert", None, 1.0), ("carl", None, None)]
    for number, (owner, expires_s, revoked_s) in enumerate([*of_others, *(("anna", *ends) for ends in keys)]):
        record = KeyRecord(
            id=f"lm-{number}",
            principal_id=owner,
            digest=bytes([number]) * 32,
            name="x",
            role=Role.USER,
            created_s=0.5,
            expires_s=expires_s,
            revoked_s=revoked_s,
        )
        await SqlKeyStore(database).add(record)
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    (item,) = await work.lease_items("me", limit=1, lease_s=30)
    assert item.may_ask == may_ask
    assert 90 < item.time_left_s < 101


async def test_an_item_that_always_kills_its_server_is_given_up(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    for _ in range(5):
        assert len(await work.lease_items("me", limit=1, lease_s=30)) == 1
        await work.release("me", interrupted=True)
    assert await work.lease_items("me", limit=1, lease_s=30) == []
    assert (await job(store, "job_1")).state is JobState.FAILED
    result = await store.result("job_1")
    assert result is not None
    assert b"interrupted" in result.body


async def test_an_item_that_always_kills_its_engine_is_given_up(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    refused, died, unknown = Setback.REFUSED, Setback.INTERRUPTED, Setback.NOT_SERVED
    for because in (died, refused, died, unknown, refused, died, died, died):
        assert (await job(store, "job_1")).state is JobState.IN_PROGRESS
        (item,) = await work.lease_items("me", limit=1, lease_s=30)
        await work.put_back(item, runner="me", delay_s=-60, because=because)
    assert await work.lease_items("me", limit=1, lease_s=30) == []
    assert (await job(store, "job_1")).state is JobState.FAILED
    result = await store.result("job_1")
    assert result is not None
    assert b"interrupted" in result.body


async def test_what_a_runner_does_not_serve_is_left_to_others(store: SqlJobStore, work: SqlJobWork) -> None:
    for number in range(2):
        await store.add(*single(f"job_{number}"), max_open=10, max_open_bytes=1000)
    (running,) = await work.lease_items("a", limit=1, lease_s=30)
    (item,) = await work.lease_items("b", limit=2, lease_s=30)
    await work.put_back(item, runner="b", delay_s=-60, because=Setback.NOT_SERVED)
    assert await work.lease_items("b", limit=2, lease_s=30) == [], "another one is at work"
    await work.finish(running, answered(running), runner="a")
    (item,) = await work.lease_items("b", limit=2, lease_s=30)
    assert (item.num_not_served, item.others_run) == (1, False)
    await work.put_back(item, runner="b", delay_s=-1, because=Setback.NOT_SERVED)
    assert await work.lease_items("b", limit=2, lease_s=30) == [], "whoever has time takes it first"
    (item,) = await work.lease_items("a", limit=2, lease_s=30)
    await work.put_back(item, runner="a", delay_s=-1, because=Setback.NOT_SERVED)
    (item,) = await work.lease_items("b", limit=2, lease_s=30)
    assert (item.num_not_served, item.others_run) == (3, False)


async def test_who_has_no_room_serves_the_model_all_the_same(store: SqlJobStore, work: SqlJobWork) -> None:
    """However often the two find an item in turn, it is not one that nobody serves."""
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    (item,) = await work.lease_items("b", limit=1, lease_s=30)
    for _ in range(3):
        await work.put_back(item, runner="b", delay_s=-1, because=Setback.NOT_SERVED)
        (item,) = await work.lease_items("a", limit=1, lease_s=30)
        assert item.num_not_served == 1
        await work.put_back(item, runner="a", delay_s=-1, because=Setback.REFUSED)
        assert await work.lease_items("b", limit=1, lease_s=30) == [], "it is left to others as before"
        (item,) = await work.lease_items("a", limit=1, lease_s=30)
        assert item.num_not_served == 0
        await work.put_back(item, runner="a", delay_s=-60, because=Setback.REFUSED)
        (item,) = await work.lease_items("b", limit=1, lease_s=30)


async def test_whoever_has_lost_an_item_does_not_give_it_up(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    for _ in range(4):
        (item,) = await work.lease_items("me", limit=1, lease_s=30)
        await work.put_back(item, runner="me", delay_s=-1, because=Setback.INTERRUPTED)
    (lost,) = await work.lease_items("me", limit=1, lease_s=30)
    await work.release("me", interrupted=False)
    (item,) = await work.lease_items("other", limit=1, lease_s=30)
    await work.put_back(lost, runner="me", delay_s=-1, because=Setback.INTERRUPTED)
    assert await work.finish(item, answered(item), runner="other")


async def test_restarts_in_good_order_give_nothing_up(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    for _ in range(12):
        assert len(await work.lease_items("me", limit=1, lease_s=30)) == 1
        await work.release("me", interrupted=False)
    assert (await job(store, "job_1")).state is JobState.IN_PROGRESS


async def test_owners_take_turns(store: SqlJobStore, work: SqlJobWork) -> None:
    await started_batch(store, work, "batch_1", 50, ANNA)
    for _ in range(10):  # Anna is under way when Bert comes
        await work.lease_items("me", limit=1, lease_s=30)
    await started_batch(store, work, "batch_2", 5, BERT)
    await store.add(*single("job_1", ANNA), max_open=10, max_open_bytes=1000)  # does not wait for her own batch
    order = [(await work.lease_items("me", limit=1, lease_s=30))[0].job_id for _ in range(14)]
    assert order.count("batch_2") == 5
    assert order.index("job_1") <= 3
    assert order[11:] == ["batch_1"] * 3


@pytest.mark.parametrize("delay_s", [1000, -60])
async def test_owners_take_turns_though_something_is_refused_all_the_time(
    store: SqlJobStore, work: SqlJobWork, delay_s: float
) -> None:
    await started_batch(store, work, "batch_1", 60, ANNA)
    await store.add(*single("job_1", BERT), max_open=10, max_open_bytes=1000)
    num_done = 0
    while num_done < 20:
        for item in await work.lease_items("me", limit=2, lease_s=30):
            if item.owner.id == "bert":
                await work.put_back(item, runner="me", delay_s=delay_s, because=Setback.REFUSED)
            else:
                num_done += await work.finish(item, answered(item), runner="me")
    await started_batch(store, work, "batch_2", 30, Principal(id="carl", name="Carl", role=Role.USER))
    order = []
    for _ in range(20):
        (item,) = await work.lease_items("me", limit=1, lease_s=30)
        order.append(item.job_id)
    assert 9 <= order.count("batch_2") <= 11
    if delay_s < 0:
        assert "job_1" in order[:2], "what was refused does not come last for it"


async def test_a_batch_from_beginning_to_end(store: SqlJobStore, work: SqlJobWork, database: Database) -> None:
    await started_batch(store, work, "batch_1", 3)
    leased = await work.lease_items("me", limit=5, lease_s=30)
    for item in leased[:2]:
        await work.finish(item, answered(item), runner="me")
    assert (await job(store, "batch_1", JobKind.BATCH)).state is JobState.IN_PROGRESS
    await work.finish(leased[2], answered(leased[2], ItemState.FAILED), runner="me")
    finalizing = await work.lease_job("me", lease_s=30)
    assert finalizing is not None
    assert finalizing.state is JobState.FINALIZING
    assert (finalizing.num_items, finalizing.num_succeeded, finalizing.num_failed) == (3, 2, 1)
    assert [result.custom_id for result in await work.results("batch_1", after=0, limit=9)] == ["c1", "c2"]
    output = FileRecord(
        id="file-o", owner_id="anna", filename="o", purpose="batch_output", num_bytes=5, created_at=time.time()
    )
    assert not await work.close("batch_1", output=output, errors=None, runner="other")
    assert await work.close("batch_1", output=output, errors=None, runner="me")
    ended = await job(store, "batch_1", JobKind.BATCH)
    assert (ended.state, ended.output_file_id, ended.error_file_id) == (JobState.COMPLETED, "file-o", None)
    assert ended.metadata == {"a": "b"}
    assert await SqlFileStore(database).get("file-o", owner_id="anna") == output
    assert await work.results("batch_1", after=-1, limit=9) == []


async def test_reading_goes_on_where_it_was_interrupted(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(batch("batch_1"), [], max_open=10, max_open_bytes=1000)
    assert await work.lease_job("me", lease_s=30) is not None
    assert await work.lease_job("other", lease_s=30) is None
    assert await work.add_items("batch_1", items(0, 4), runner="me")
    (early,) = await work.lease_items("me", limit=1, lease_s=30)
    await work.finish(early, answered(early), runner="me")
    await work.release("me", interrupted=True)
    assert not await work.add_items("batch_1", items(4, 4), runner="me")
    assert await work.lease_job("other", lease_s=30) is not None
    for first in (0, 4):
        assert await work.add_items("batch_1", items(first, 4), runner="other")
    await work.begin("batch_1", num_items=8, runner="other")
    rest = await work.lease_items("other", limit=20, lease_s=30)
    assert sorted(item.position for item in rest) == list(range(1, 8))
    for item in rest:
        await work.finish(item, answered(item), runner="other")
    ended = await job(store, "batch_1", JobKind.BATCH)
    assert (ended.state, ended.num_succeeded) == (JobState.FINALIZING, 8)


async def test_a_batch_all_of_whose_items_ended_while_it_was_read(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(batch("batch_1"), [], max_open=10, max_open_bytes=1000)
    await work.lease_job("me", lease_s=30)
    await work.add_items("batch_1", items(0, 1), runner="me")
    (item,) = await work.lease_items("me", limit=1, lease_s=30)
    await work.finish(item, answered(item), runner="me")
    assert (await job(store, "batch_1", JobKind.BATCH)).state is JobState.VALIDATING
    await work.begin("batch_1", num_items=1, runner="me")
    assert (await job(store, "batch_1", JobKind.BATCH)).state is JobState.FINALIZING


async def test_a_rejected_batch(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(batch("batch_1"), [], max_open=10, max_open_bytes=1000)
    await work.lease_job("me", lease_s=30)
    errors = (LineError(code="x", message="y", line=3, param="z"),)
    await work.reject("batch_1", errors, runner="other")
    assert (await job(store, "batch_1", JobKind.BATCH)).state is JobState.VALIDATING
    await work.add_items("batch_1", items(0, 2), runner="me")
    (running,) = await work.lease_items("me", limit=1, lease_s=30)
    await work.reject("batch_1", errors, runner="me")
    failed = await job(store, "batch_1", JobKind.BATCH)
    assert (failed.state, failed.errors) == (JobState.FAILED, errors)
    assert await work.lease_items("me", limit=5, lease_s=30) == []
    assert not await work.finish(running, answered(running), runner="me")


async def test_a_batch_that_is_given_back_lets_others_go_first(store: SqlJobStore, work: SqlJobWork) -> None:
    for number in range(2):
        await store.add(batch(f"batch_{number}"), [], max_open=10, max_open_bytes=1000)
    order = []
    for _ in range(3):
        taken = await work.lease_job("me", lease_s=30)
        order.append(taken and taken.id)
        await work.give_back("batch_0", runner="me", delay_s=1000)
    assert order == ["batch_0", "batch_1", None]
    await work.look_after(keep_ended_s=1000, max_owner_bytes=1000)
    assert await work.lease_job("me", lease_s=30) is None
    await store.cancel("batch_0")  # there is something else to be done now
    assert (await work.lease_job("me", lease_s=30)) is not None


async def test_cancelling_ends_what_is_queued_and_what_runs(store: SqlJobStore, work: SqlJobWork) -> None:
    await started_batch(store, work, "batch_1", 3)
    done, running = await work.lease_items("me", limit=2, lease_s=30)
    await work.finish(done, answered(done), runner="me")
    await store.cancel("batch_1")
    assert not await work.finish(running, answered(running), runner="me")
    assert await work.lease_items("me", limit=5, lease_s=30) == []
    cancelling = await work.lease_job("me", lease_s=30)
    assert cancelling is not None
    assert cancelling.state is JobState.CANCELLING
    states = [result.state for result in await work.results("batch_1", after=-1, limit=5)]
    assert states == [ItemState.SUCCEEDED, ItemState.CANCELLED, ItemState.CANCELLED]
    assert await work.close("batch_1", output=None, errors=None, runner="me")
    assert (await job(store, "batch_1", JobKind.BATCH)).state is JobState.CANCELLED


async def test_cancelling_while_the_file_is_read(store: SqlJobStore, work: SqlJobWork) -> None:
    await store.add(batch("batch_1"), [], max_open=10, max_open_bytes=1000)
    await work.lease_job("me", lease_s=30)
    await work.add_items("batch_1", items(0, 2), runner="me")
    await store.cancel("batch_1")
    assert not await work.add_items("batch_1", items(2, 2), runner="me")
    await work.begin("batch_1", num_items=4, runner="me")
    assert (await job(store, "batch_1", JobKind.BATCH)).state is JobState.CANCELLING
    assert await work.lease_items("me", limit=5, lease_s=30) == []


async def test_what_expires_ends_without_the_rest(
    store: SqlJobStore, work: SqlJobWork, database: Database
) -> None:
    await started_batch(store, work, "batch_1", 2)
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    async with database.write() as connection:
        await connection.execute(update(jobs_table).values(expires_at=1.0))
    await work.look_after(keep_ended_s=1000, max_owner_bytes=1000)
    assert (await job(store, "job_1")).state is JobState.EXPIRED
    expiring = await work.lease_job("me", lease_s=30)
    assert expiring is not None
    assert expiring.state is JobState.EXPIRING
    await work.close("batch_1", output=None, errors=None, runner="me")
    assert (await job(store, "batch_1", JobKind.BATCH)).state is JobState.EXPIRED


async def test_what_ended_long_ago_is_forgotten(store: SqlJobStore, work: SqlJobWork) -> None:
    for number in range(2):
        await store.add(*single(f"job_{number}"), max_open=10, max_open_bytes=1000)
    await store.cancel("job_0")
    await work.look_after(keep_ended_s=1000, max_owner_bytes=1000)
    assert await store.get("job_0", kind=JobKind.INFERENCE, owner_id=None) is not None
    await work.look_after(keep_ended_s=-1, max_owner_bytes=1000)
    assert await store.get("job_0", kind=JobKind.INFERENCE, owner_id=None) is None
    assert await store.result("job_0") is None
    assert await store.get("job_1", kind=JobKind.INFERENCE, owner_id=None) is not None


async def test_what_is_kept_of_results_is_bounded_for_each_owner(store: SqlJobStore, work: SqlJobWork) -> None:
    sizes = {"job_0": 300, "job_1": 600, "job_2": 300, "job_3": 1, "job_bert": 2000, "job_open": None}
    for job_id, size in sizes.items():
        await store.add(*single(job_id, BERT if job_id == "job_bert" else ANNA), max_open=9, max_open_bytes=1000)
        if size:
            (item,) = await work.lease_items("me", limit=1, lease_s=30)
            await work.finish(item, replace(answered(item), body=b"1" * size), runner="me")
    await store.cancel("job_open")
    await store.add(*single("job_open_still"), max_open=9, max_open_bytes=1000)
    await work.look_after(keep_ended_s=1000, max_owner_bytes=1000)
    left = [one.id for one in await store.page(kind=JobKind.INFERENCE, owner_id="anna", after=None, limit=9)]
    assert left == ["job_open_still", "job_open", "job_3", "job_2", "job_1"]
    assert await store.result("job_0") is None
    assert await store.result("job_bert") is not None, "the latest is there, however long"


async def test_only_ended_jobs_are_deleted(store: SqlJobStore) -> None:
    await store.add(*single("job_1"), max_open=10, max_open_bytes=1000)
    await store.delete("job_1")
    assert (await job(store, "job_1")).state is JobState.IN_PROGRESS
    await store.cancel("job_1")
    await store.delete("job_1")
    assert await store.get("job_1", kind=JobKind.INFERENCE, owner_id=None) is None


def record(file_id: str, **changes: object) -> FileRecord:
    base = FileRecord(
        id=file_id, owner_id="anna", filename="f", purpose="batch", num_bytes=10, created_at=time.time()
    )
    return replace(base, **changes)  # type: ignore[arg-type]


async def test_files_are_their_owners_and_bounded(database: Database) -> None:
    store = SqlFileStore(database)
    await store.add(record("file-1"), max_owner_bytes=25)
    await store.add(record("file-2"), max_owner_bytes=25)
    with pytest.raises(QuotaExceededError, match="delete some first"):
        await store.add(record("file-3"), max_owner_bytes=25)
    await store.add(record("file-3", owner_id="bert"), max_owner_bytes=25)
    assert await store.num_bytes("anna") == 20
    assert await store.get("file-3", owner_id="anna") is None
    assert [one.id for one in await store.page(FileQuery(owner_id="anna"))] == ["file-2", "file-1"]
    assert len(await store.page(FileQuery(owner_id=None))) == 3
    await store.delete("file-1")
    assert await store.known(["file-1", "file-2", "file-9"]) == {"file-2"}


async def test_even_empty_files_are_bounded(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "_MAX_OWNER_FILES", 2)
    store = SqlFileStore(database)
    for number in range(2):
        await store.add(record(f"file-{number}", num_bytes=0), max_owner_bytes=25)
    with pytest.raises(QuotaExceededError, match="2 files here already"):
        await store.add(record("file-2", num_bytes=0), max_owner_bytes=25)
    await store.add(record("file-2", num_bytes=0, owner_id="bert"), max_owner_bytes=25)


async def test_quotas_hold_for_uploads_at_once(database: Database) -> None:
    store = SqlFileStore(database)
    added = await asyncio.gather(
        *(store.add(record(f"file-{number}"), max_owner_bytes=35) for number in range(8)), return_exceptions=True
    )
    assert sum(one is None for one in added) == 3


async def test_a_list_of_files_does_not_end_where_one_was_deleted(database: Database) -> None:
    store = SqlFileStore(database)
    for number, owner in enumerate(["anna", "anna", "anna", "bert"]):
        await store.add(record(f"file-{number}", owner_id=owner), max_owner_bytes=100)
    query = FileQuery(owner_id="anna", after="file-2")
    assert [file.id for file in await store.page(query)] == ["file-1", "file-0"]
    assert [file.id for file in await store.page(replace(query, after="file-1", newest_first=False))] == ["file-2"]
    await store.delete("file-2")
    for after in ("file-2", "file-3"):
        with pytest.raises(InvalidRequestError, match=after):
            await store.page(replace(query, after=after))


async def test_expired_files_are_not_there(database: Database) -> None:
    store = SqlFileStore(database)
    await store.add(record("file-1", expires_at=1.0), max_owner_bytes=100)
    await store.add(record("file-2", expires_at=time.time() + 100), max_owner_bytes=100)
    assert await store.get("file-1", owner_id=None) is None
    assert await store.delete_expired() == ["file-1"]
    assert await store.delete_expired() == []
    assert await store.get("file-2", owner_id=None) is not None
