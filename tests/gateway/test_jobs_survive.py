"""Jobs end exactly once, whatever happens to the processes that run them. What counts ends is the database itself."""

import asyncio
import json
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from localmoe.state.config import StateConfig
from localmoe.state.database import Database
from support.postgres import running_postgres

_SERVER = Path(__file__).parents[1] / "support" / "jobs_server.py"
NUM_JOBS = 500


class Server:
    """A gateway in a process of its own."""

    def __init__(self, home: Path, settings: dict[str, dict[str, Any]]) -> None:
        home.mkdir(exist_ok=True)
        command = [sys.executable, str(_SERVER), str(home), json.dumps(settings)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        assert port, "it did not start"
        self.url = f"http://127.0.0.1:{port}"

    def kill(self) -> None:
        self._process.kill()
        self.join()

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        self.join()

    def join(self) -> None:
        self._process.wait(20)
        assert self._process.stdout is not None
        self._process.stdout.close()


@contextmanager
def serving(home: Path, **settings: dict[str, Any]) -> Iterator[Server]:
    server = Server(home, settings)
    try:
        yield server
    finally:
        server.stop()


async def submit(url: str, number: int) -> list[str]:
    """Ids of jobs that were accepted."""
    async with httpx2.AsyncClient(base_url=url, timeout=60) as client:

        async def one(index: int) -> str:
            body = {"model": "tiny", "text": f"question {index}", "mode": "async"}
            answer = await client.post("/v1/inference", json=body)
            assert answer.status_code == 202, answer.text
            job_id: str = answer.json()["id"]
            return job_id

        ids: list[str] = []
        for first in range(0, number, 50):
            ids += await asyncio.gather(*map(one, range(first, min(number, first + 50))))
    return ids


def count_ends(path: Path) -> None:
    """From now on the database writes down every end of a job, and of an item."""
    with sqlite3.connect(path) as database:
        database.executescript(
            """
            CREATE TABLE ends (id TEXT);
            CREATE TRIGGER job_ends AFTER UPDATE OF ended_at ON jobs WHEN NEW.ended_at IS NOT NULL
                AND OLD.ended_at IS NULL OR OLD.ended_at <> NEW.ended_at
                BEGIN INSERT INTO ends VALUES (NEW.id); END;
            CREATE TRIGGER item_ends AFTER UPDATE OF result ON job_items WHEN NEW.result IS NOT NULL
                BEGIN INSERT INTO ends VALUES (NEW.job_id || '/' || NEW.position); END;
            """
        )
    database.close()


def query(path: Path, statement: str) -> list[tuple[Any, ...]]:
    database = sqlite3.connect(path, timeout=30)
    try:
        return database.execute(statement).fetchall()
    finally:
        database.close()


def num_ended(path: Path) -> int:
    return int(query(path, "SELECT count(*) FROM jobs WHERE ended_at IS NOT NULL")[0][0])


async def until(condition: Callable[[], bool], timeout_s: float = 120) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 (of another process)
            await asyncio.sleep(0.02)


@pytest.mark.slow
async def test_jobs_end_exactly_once_though_the_server_is_killed_three_times(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    server = Server(tmp_path, {})
    await submit(server.url, 1)
    count_ends(path)
    ids = await submit(server.url, NUM_JOBS)
    rng = random.Random(7)
    for share in (0.1, 0.35, 0.7):
        await until(lambda share=share: num_ended(path) > share * NUM_JOBS)  # type: ignore[misc]
        await asyncio.sleep(rng.random() * 0.05)
        server.kill()
        assert num_ended(path) < NUM_JOBS
        server = Server(tmp_path, {})
    await until(lambda: num_ended(path) == NUM_JOBS + 1)
    server.stop()
    ends = Counter(row[0] for row in query(path, "SELECT id FROM ends"))
    assert [ends[job_id] for job_id in ids] == [1] * NUM_JOBS
    assert [ends[f"{job_id}/0"] for job_id in ids] == [1] * NUM_JOBS
    assert query(path, "SELECT DISTINCT state FROM jobs") == [("completed",)]
    assert query(path, "SELECT DISTINCT state FROM job_items") == [("succeeded",)]
    assert query(path, "PRAGMA integrity_check") == [("ok",)]
    starts = Counter(row[0] for row in query(path, "SELECT num_starts FROM job_items"))
    assert max(starts) > 1, "something was under way each time"
    assert max(starts) <= 4


@pytest.mark.slow
async def test_a_batch_is_whole_though_the_server_is_killed(tmp_path: Path) -> None:
    """Killed while the file is read, while requests run, and while answers are written."""
    lines = [
        {
            "custom_id": f"request-{number}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "tiny", "prompt": "hi"},
        }
        for number in range(3000)
    ]
    contents = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    path = tmp_path / "state.db"
    settings = {"jobs": {"max_running": 32}}
    server = Server(tmp_path, settings)
    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:
        form = {"files": {"file": ("in.jsonl", contents)}, "data": {"purpose": "batch"}}
        file = (await client.post("/v1/files", **form)).json()  # type: ignore[arg-type]
        body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        batch = (await client.post("/v1/batches", json=body)).json()
    for condition in (
        "SELECT 1 WHERE (SELECT count(*) FROM job_items) > 1000",
        "SELECT 1 FROM jobs WHERE num_succeeded > 300",
        "SELECT 1 FROM jobs WHERE state = 'finalizing'",
    ):
        await until(lambda condition=condition: bool(query(path, condition)))  # type: ignore[misc]
        server.kill()
        server = Server(tmp_path, settings)
    await until(lambda: num_ended(path) == 1)
    async with httpx2.AsyncClient(base_url=server.url, timeout=60) as client:
        batch = (await client.get(f"/v1/batches/{batch['id']}")).json()
        output = (await client.get(f"/v1/files/{batch['output_file_id']}/content")).text.splitlines()
    server.stop()
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 3000, "completed": 3000, "failed": 0}
    assert batch["error_file_id"] is None
    answered = [json.loads(line)["custom_id"] for line in output]
    assert answered == [line["custom_id"] for line in lines]
    assert query(path, "SELECT count(*) FROM job_items") == [(0,)]
    assert {one.name for one in (tmp_path / "files").iterdir()} >= {file["id"], batch["output_file_id"]}


@pytest.mark.slow
async def test_two_gateways_share_jobs_and_one_goes_on_for_the_other(tmp_path: Path) -> None:
    number = 200
    with running_postgres() as make:
        state = {"database_url": make(), "files_directory": str(tmp_path / "files")}
        settings = {"state": state, "jobs": {"lease_s": 2.0}}
        database = Database(StateConfig(**state), default_path=tmp_path / "unused")

        async def rows(statement: str) -> list[tuple[Any, ...]]:
            async with database.read() as connection:
                return [tuple(row) for row in await connection.exec_driver_sql(statement)]

        runners: set[str] = set()

        async def until_ended(least: int, num_runners: int = 0) -> None:
            """And until so many have been seen at work, or there is no more of it."""
            num_ended = 0
            async with asyncio.timeout(120):
                while num_ended < least or (len(runners) < num_runners and num_ended < number):
                    await asyncio.sleep(0.05)
                    owners = await rows("SELECT DISTINCT lease_owner FROM job_items WHERE lease_owner IS NOT NULL")
                    runners.update(owner for (owner,) in owners)
                    ((num_ended,),) = await rows("SELECT count(*) FROM jobs WHERE ended_at IS NOT NULL")

        async with database.write() as connection:
            for statement in (
                "CREATE TABLE ends (id TEXT)",
                "CREATE FUNCTION note_end() RETURNS trigger LANGUAGE plpgsql AS "
                "$$ BEGIN INSERT INTO ends VALUES (NEW.job_id); RETURN NEW; END $$",
                "CREATE TRIGGER item_ends AFTER UPDATE OF result ON job_items FOR EACH ROW "
                "WHEN (NEW.result IS NOT NULL) EXECUTE FUNCTION note_end()",
            ):
                await connection.exec_driver_sql(statement)
        first, second = Server(tmp_path / "a", settings), Server(tmp_path / "b", settings)
        ids = await submit(first.url, number)
        await until_ended(number // 4, num_runners=2)
        first.kill()
        await until_ended(number)
        second.stop()
        ends = Counter(row[0] for row in await rows("SELECT id FROM ends"))
        states = await rows("SELECT DISTINCT state FROM jobs")
        await database.close()
    assert ends == dict.fromkeys(ids, 1)
    assert states == [("completed",)]
    assert len(runners) == 2
