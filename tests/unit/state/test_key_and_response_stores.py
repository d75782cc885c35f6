"""API keys and responses in the database."""

import asyncio
import time

import pytest
from sqlalchemy import select, update

from localmoe.core.errors import ConflictError
from localmoe.core.identity import RateLimits, Role
from localmoe.core.keys import KeyRecord
from localmoe.state.database import Database
from localmoe.state.keys import SqlKeyStore
from localmoe.state.responses import SqlResponseStore
from localmoe.state.schema import responses

RECORD = KeyRecord(
    id="lm-1",
    principal_id="lm-0",
    digest=b"\x00\xff" * 16,
    name="'; DROP TABLE api_keys; --",
    role=Role.OPERATOR,
    models=("a", "ü"),
    limits=RateLimits(requests_per_minute=5),
    created_s=1.5,
    expires_s=2.5,
)


def record(number: int) -> KeyRecord:
    return KeyRecord(
        id=f"lm-{number}",
        principal_id=f"lm-{number}",
        digest=bytes([number]) * 32,
        name="x",
        role=Role.USER,
        created_s=float(number),
    )


async def test_a_key_comes_back_as_it_was(database: Database) -> None:
    store = SqlKeyStore(database)
    await store.add(RECORD)
    assert await store.find(RECORD.digest) == RECORD
    assert await store.find(b"\x00" * 32) is None
    assert await store.find(b"' OR 1=1") is None


async def test_ids_and_digests_are_there_once(database: Database) -> None:
    store = SqlKeyStore(database)
    added = await asyncio.gather(*(store.add(RECORD) for _ in range(4)), return_exceptions=True)
    assert [type(one) for one in added].count(ConflictError) == 3
    assert list(await store.all()) == [RECORD]


async def test_keys_are_revoked_at_the_earliest_time_said(database: Database) -> None:
    store = SqlKeyStore(database)
    for number in (2, 1):
        await store.add(record(number))
    assert [one.id for one in await store.all()] == ["lm-1", "lm-2"]
    for at_s, then_s in ((50.0, 50.0), (60.0, 50.0), (40.0, 40.0)):
        assert await store.revoke("lm-1", at_s=at_s)
        first, second = await store.all()
        assert (first.revoked_s, second.revoked_s) == (then_s, None)
    assert not await store.revoke("lm-9", at_s=1.0)


async def test_a_key_that_was_revoked_since_it_was_read_is_not_replaced(database: Database) -> None:
    """Whatever the clocks say of when that was."""
    store = SqlKeyStore(database)
    await store.add(record(1))
    (first,) = await store.all()
    assert await store.replace(first, record(2), until_s=9.0)
    assert not await store.replace(first, record(4), until_s=20.0)
    first, second = await store.all()
    assert await store.replace(first, record(3), until_s=20.0)
    assert [one.revoked_s for one in await store.all()] == [9.0, None, None]
    await store.revoke("lm-2", at_s=1000.0)
    assert not await store.replace(second, record(4), until_s=10.0)
    assert not await store.replace(record(9), record(4), until_s=10.0)
    with pytest.raises(ConflictError):
        await store.replace(record(3), record(1), until_s=10.0)
    now = [(one.id, one.revoked_s) for one in await store.all()]
    assert now == [("lm-1", 9.0), ("lm-2", 1000.0), ("lm-3", None)]


async def test_uses_are_recorded_and_never_taken_back(database: Database) -> None:
    store = SqlKeyStore(database)
    for number in (1, 2):
        await store.add(record(number))
    await store.touch({})
    await store.touch({"lm-1": 10.0, "lm-9": 10.0})
    await store.touch({"lm-1": 5.0, "lm-2": 7.0})
    assert [one.last_used_s for one in await store.all()] == [10.0, 7.0]


async def test_responses_are_their_owners(database: Database) -> None:
    store = SqlResponseStore(database, max_owner_bytes=100, keep_s=100)
    await store.put("anna", "resp_1", b"first")
    await store.put("anna", "resp_1", b"second")
    await store.put("bert", "resp_1", b"other")
    assert await store.get("anna", "resp_1") == b"second"
    assert await store.get("bert", "resp_1") == b"other"
    assert await store.get("bert", "resp_2") is None
    assert await store.delete("anna", "resp_1")
    assert not await store.delete("anna", "resp_1")
    assert await store.get("anna", "resp_1") is None
    assert await store.get("bert", "resp_1") == b"other"


async def test_responses_are_bounded_and_the_oldest_go(database: Database) -> None:
    store = SqlResponseStore(database, max_owner_bytes=100, keep_s=100)
    await store.put("bert", "resp_0", bytes(90))
    for number in range(5):
        await store.put("anna", f"resp_{number}", bytes(30))
    kept = [number for number in range(5) if await store.get("anna", f"resp_{number}")]
    assert kept == [2, 3, 4]
    await store.put("anna", "resp_9", bytes(101))
    assert await store.get("anna", "resp_9") is None
    assert await store.get("bert", "resp_0") is not None


async def test_old_responses_go(database: Database) -> None:
    store = SqlResponseStore(database, max_owner_bytes=100, keep_s=100)
    await store.put("anna", "resp_1", b"x")
    async with database.write() as connection:
        await connection.execute(update(responses).values(changed_at=time.time() - 101))
    await store.put("bert", "resp_2", b"y")
    async with database.read() as connection:
        assert list((await connection.execute(select(responses.c.id))).scalars()) == ["resp_2"]


async def test_bounds_beyond_32_bits(database: Database) -> None:
    store = SqlResponseStore(database, max_owner_bytes=2**40, keep_s=100)
    await store.put("anna", "resp_1", b"x")
    assert await store.get("anna", "resp_1") == b"x"


async def test_a_response_that_is_all_there_is_room_for_is_kept(database: Database) -> None:
    store = SqlResponseStore(database, max_owner_bytes=100, keep_s=100)
    for number in range(3):
        await store.put("anna", f"resp_{number}", bytes(99))
        assert [bool(await store.get("anna", f"resp_{old}")) for old in range(number + 1)].count(True) == 1
        assert await store.get("anna", f"resp_{number}") is not None


@pytest.mark.parametrize("size", [0, 1, 1 << 20])
async def test_any_bytes_come_back(database: Database, size: int) -> None:
    store = SqlResponseStore(database, max_owner_bytes=1 << 21, keep_s=100)
    data = bytes(range(256)) * (size // 256) + b"\x00" * (size % 256)
    await store.put("anna", "resp_1", data)
    assert await store.get("anna", "resp_1") == data
