"""The state database: opened, brought up to date, shared, full, gone."""

import asyncio
import errno
import random
import sqlite3
import stat
import struct
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import insert, select, text
from sqlalchemy.exc import IntegrityError

from localmoe.core.errors import StorageError, StorageFullError
from localmoe.state.config import StateConfig
from localmoe.state.database import Database
from localmoe.state.schema import files, job_items, jobs, metadata


def _file(number: int) -> dict[str, object]:
    return {
        "id": f"file-{number}",
        "owner_id": "me",
        "filename": "x" * 200,
        "purpose": "batch",
        "num_bytes": 1,
        "created_at": 0.0,
        "expires_at": None,
    }


async def _num_files(database: Database) -> int:
    async with database.read() as connection:
        return len((await connection.execute(select(files.c.id))).all())


async def test_migrations_make_the_tables(database: Database) -> None:
    async with database.write() as connection:
        differences = await connection.run_sync(
            lambda sync: compare_metadata(MigrationContext.configure(sync), metadata)
        )
    assert differences == []


async def test_what_is_kept_of_results_is_known_of_older_ones(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before 0002 the size of a job was its request's."""
    job = {"owner_id": "me", "owner": b"{}", "endpoint": "/", "created_at": 0.0, "expires_at": 0.0}
    numbers = {"num_bytes": 7, "num_items": 1, "num_succeeded": 1, "num_failed": 0}
    item = {"position": 0, "state": "succeeded", "flow": "", "turn": 0, "due_at": 0.0, "body": b""}
    to_the_end = command.upgrade
    with monkeypatch.context() as patches:
        patches.setattr(command, "upgrade", lambda config, _: to_the_end(config, "0001"))
        async with database.write() as connection:
            for kind, ended_at in (("inference", 1.0), ("inference", None), ("batch", 1.0)):
                values = {**job, **numbers, "id": f"{kind} {ended_at}", "kind": kind, "ended_at": ended_at}
                await connection.execute(insert(jobs).values(**values, state="completed"))
                result = {**item, "job_id": values["id"], "num_starts": 1, "num_refusals": 0, "result": b"x" * 100}
                await connection.execute(insert(job_items).values(result))
    database._is_open = False
    async with database.read() as connection:
        found = await connection.execute(select(jobs.c.id, jobs.c.num_bytes))
        sizes = {row.id: row.num_bytes for row in found}
    assert sizes == {"inference 1.0": 100, "inference None": 7, "batch 1.0": 7}


async def test_several_processes_open_one_database_at_once(database: Database, tmp_path: Path) -> None:
    url = (
        str(database._writer.url.render_as_string(hide_password=False))
        .replace("+aiosqlite", "")
        .replace("+asyncpg", "")
    )
    others = [Database(StateConfig(database_url=url), default_path=tmp_path / "state.db") for _ in range(7)]
    try:
        assert await asyncio.gather(*map(_num_files, [database, *others])) == [0] * 8
    finally:
        for other in others:
            await other.close()


async def test_what_is_written_is_there_or_not_at_all(database: Database) -> None:
    async with database.write() as connection:
        await connection.execute(insert(files).values(_file(1)))

    async def fail() -> None:
        async with database.write() as connection:
            await connection.execute(insert(files).values(_file(2)))
            raise KeyError

    with pytest.raises(KeyError):
        await fail()
    assert await _num_files(database) == 1


async def test_writers_at_once_wait_for_each_other(database: Database) -> None:
    async def write(number: int) -> None:
        async with database.write() as connection:
            await connection.execute(insert(files).values(_file(number)))

    await asyncio.gather(*map(write, range(60)))
    assert await _num_files(database) == 60


async def test_cancelled_writers_leave_the_database_usable(database: Database) -> None:
    await _num_files(database)
    rng = random.Random(1)

    async def write(number: int) -> None:
        async with database.write() as connection:
            await connection.execute(insert(files).values(_file(number)))
            await connection.execute(select(files.c.id))

    for number in range(0, 200, 4):
        tasks = [asyncio.create_task(write(number + place)) for place in range(4)]
        for _ in range(rng.randrange(30)):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    before = await _num_files(database)
    async with asyncio.timeout(5):
        await write(1000)
    assert await _num_files(database) == before + 1


async def test_the_clock_is_unix_time(database: Database) -> None:
    import time

    async with database.read() as connection:
        now_s = (await connection.execute(select(database.now))).scalar_one()
    assert abs(now_s - time.time()) < 2


async def test_the_file_is_private(tmp_path: Path) -> None:
    database = Database(StateConfig(), default_path=tmp_path / "new" / "state.db")
    await _num_files(database)
    await database.close()
    assert stat.S_IMODE((tmp_path / "new" / "state.db").stat().st_mode) == 0o600


async def test_a_full_database_is_named_and_intact(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    database = Database(StateConfig(), default_path=path)
    async with database.write() as connection:
        await connection.execute(text("PRAGMA max_page_count = 60"))
    written = 0

    async def fill() -> None:
        nonlocal written
        for number in range(10_000):
            async with database.write() as connection:
                await connection.execute(insert(files).values(_file(number)))
            written += 1

    with pytest.raises(StorageFullError, match="make room"):
        await fill()
    assert written > 10
    assert await _num_files(database) == written
    async with database.write() as connection:
        await connection.execute(text("PRAGMA max_page_count = 10000"))
        await connection.execute(insert(files).values(_file(-1)))
    await database.close()
    with sqlite3.connect(path) as plain:
        assert plain.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert plain.execute("SELECT count(*) FROM files").fetchone() == (written + 1,)
    plain.close()


async def test_a_damaged_database_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"no database at all " * 500)
    database = Database(StateConfig(), default_path=path)
    with pytest.raises(StorageError, match="damaged"):
        await _num_files(database)
    await database.close()


async def test_a_newer_database_is_refused(tmp_path: Path) -> None:
    first = Database(StateConfig(), default_path=tmp_path / "state.db")
    async with first.write() as connection:
        await connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    await first.close()
    second = Database(StateConfig(), default_path=tmp_path / "state.db")
    with pytest.raises(StorageError, match="not of this version"):
        await _num_files(second)
    await second.close()


async def test_a_database_that_comes_back_is_used(tmp_path: Path) -> None:
    directory = tmp_path / "later"
    directory.write_text("in the way")
    database = Database(StateConfig(), default_path=directory / "state.db")
    with pytest.raises(StorageError):
        await _num_files(database)
    directory.unlink()
    assert await _num_files(database) == 0
    await database.close()


async def test_who_waits_for_a_database_that_does_not_open_fails_with_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tries = 0
    database = Database(StateConfig(), default_path=tmp_path / "state.db")

    async def hang() -> None:
        nonlocal num_tries
        num_tries += 1
        await asyncio.sleep(0.05)
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(database, "_bring_up_to_date", hang)
    failures = await asyncio.gather(*(_num_files(database) for _ in range(20)), return_exceptions=True)
    assert {type(failure) for failure in failures} == {StorageFullError}
    assert num_tries == 1
    with pytest.raises(StorageFullError):
        await _num_files(database)
    assert num_tries == 2
    monkeypatch.undo()
    assert await _num_files(database) == 0
    await database.close()


async def test_a_server_that_is_not_there_is_named_without_its_password() -> None:
    url = "postgresql://me:geheim@127.0.0.1:1/none"
    database = Database(StateConfig(database_url=url), default_path=Path("unused"))
    with pytest.raises(StorageError) as failure:
        await _num_files(database)
    assert "geheim" not in str(failure.value)
    await database.close()


async def test_another_writer_is_waited_for_and_not_for_ever(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    database = Database(StateConfig(busy_timeout_s=0.2), default_path=path)
    await _num_files(database)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StorageError, match="another process"):
        async with database.write() as connection:
            await connection.execute(insert(files).values(_file(1)))
    assert await _num_files(database) == 0  # readers do not wait
    other.execute("COMMIT")
    other.close()
    async with database.write() as connection:
        await connection.execute(insert(files).values(_file(1)))
    await database.close()


@pytest.mark.parametrize(
    "url",
    [
        "mysql://x/y",
        "sqlite://",
        "sqlite:///",
        "sqlite:///:memory:",
        "sqlite:///a.db?mode=ro",
        "file",
        "postgresql://me:geheim@host:port/name",
        "postgresql://me:geheim@host:99999/name",
        "postgresql://me:geheim@host/name?sslmode=perhaps",
        "postgresql://me:geheim@host/name?connect_timeout=3",
    ],
)
def test_other_databases_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match="database_url") as failure:
        StateConfig(database_url=url)
    assert "geheim" not in str(failure.value)


async def test_the_connection_is_secured_as_the_url_says() -> None:
    """A server that speaks in the clear only: nothing is told it."""
    heard, is_over = bytearray(), asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.extend(await reader.readexactly(8))
        writer.write(b"N")
        heard.extend(await reader.read())
        writer.close()
        await writer.wait_closed()
        is_over.set()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    url = f"postgresql://me:geheim@127.0.0.1:{port}/none?sslmode=require"
    database = Database(StateConfig(database_url=url), default_path=Path("unused"))
    with pytest.raises(StorageError):
        await _num_files(database)
    await database.close()
    await is_over.wait()
    server.close()
    await server.wait_closed()
    assert bytes(heard) == struct.pack(">ii", 8, 80877103)  # an SSLRequest


async def test_a_path_is_no_url(tmp_path: Path) -> None:
    path = tmp_path / "p%41?x" / "state.db"
    database = Database(StateConfig(), default_path=path)
    assert await _num_files(database) == 0
    await database.close()
    assert path.exists()


async def test_what_is_wrong_is_no_trouble_of_the_databases(database: Database) -> None:
    """Whoever tries that again would try for ever."""

    async def write_twice() -> None:
        async with database.write() as connection:
            for _ in range(2):
                await connection.execute(insert(files).values(_file(1)))

    with pytest.raises(IntegrityError):
        await write_twice()
    assert await _num_files(database) == 0
