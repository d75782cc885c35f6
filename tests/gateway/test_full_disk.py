"""A real disk that is full: what needs no state goes on, the rest says what is wrong, and nothing is lost."""

import asyncio
import json
import os
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from localmoe.backends.scripted import ScriptedBackend
from localmoe.gateway.cache.disk import DiskLevel
from localmoe.gateway.jobs import runner
from localmoe.state.config import StateConfig
from localmoe.text.text_model import TextModel
from support.stateful import stateful_gateway
from support.tiny_text import encode

NUM_BYTES = 2 * 2**20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={NUM_BYTES}", "tmpfs", str(place)]
    if os.getuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small disk takes root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def fill(disk: Path) -> Path:
    filler = disk / "filler"
    with open(filler, "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                continue
    return filler


async def test_state_on_a_full_disk(
    text_model: TextModel, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ask = {"model": "tiny", "text": "hi", "mode": "async"}
    form = {"files": {"file": ("a", b"x" * 20_000)}, "data": {"purpose": "batch"}}
    backend = ScriptedBackend(encode(text_model, "hello"), delay_s=0.2)
    async with stateful_gateway(text_model, backend, small_disk) as gateway:
        client = gateway.client
        kept = (await client.post("/v1/files", **form)).json()  # type: ignore[arg-type]
        before = [(await client.post("/v1/inference", json=ask)).json()["id"] for _ in range(4)]
        filler = fill(small_disk)
        # Their answers cannot be recorded now, nor new ones taken.
        for _ in range(3):
            refused = await client.post("/v1/inference", json=ask)
            assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
            assert (
                "make room" in refused.json()["error"]["message"] or "full" in refused.json()["error"]["message"]
            )
            refused = await client.post("/v1/files", **form)  # type: ignore[arg-type]
            assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
        body = {"model": "tiny", "prompt": "hi", "max_tokens": 1}
        assert (await client.post("/v1/completions", json=body)).status_code == 200
        assert (await client.get(f"/v1/files/{kept['id']}")).status_code == 200
        assert (await client.get(f"/v1/jobs/{before[0]}")).status_code == 200
        filler.unlink()
        async with asyncio.timeout(60):
            for job_id in before:
                while (await client.get(f"/v1/jobs/{job_id}")).json()["status"] != "completed":  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        assert (await client.post("/v1/inference", json=ask)).status_code == 202
        assert [path.name for path in (small_disk / "files").iterdir()] == [kept["id"]]
    complaints = [message for message in caplog.messages if message.startswith("jobs wait")]
    assert len(complaints) == len(set(complaints)) > 0  # though four items try again and again
    database = sqlite3.connect(small_disk / "state.db")
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    database.close()


async def test_a_batch_whose_answers_find_no_room_is_written_later(
    text_model: TextModel, small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk of the files is full, not that of the database."""
    monkeypatch.setattr(runner, "_BATCH_RETRY_S", 0.05)
    home, files = tmp_path / "home", small_disk / "files"
    home.mkdir()
    state = StateConfig(files_directory=str(files))
    text = encode(text_model, "hello " * 10)
    line = {"method": "POST", "url": "/v1/completions", "body": {"model": "tiny", "prompt": "hi"}}
    contents = b"\n".join(json.dumps({**line, "custom_id": str(number)}).encode() for number in range(100))
    async with stateful_gateway(text_model, ScriptedBackend(text), home, state_config=state) as gateway:
        client = gateway.client
        form = {"files": {"file": ("a", contents)}, "data": {"purpose": "batch"}}
        file = (await client.post("/v1/files", **form)).json()  # type: ignore[arg-type]
        filler = fill(small_disk)
        body = {"input_file_id": file["id"], "endpoint": "/v1/completions", "completion_window": "24h"}
        path = f"/v1/batches/{(await client.post('/v1/batches', json=body)).json()['id']}"
        async with asyncio.timeout(60):
            while (await client.get(path)).json()["status"] != "finalizing":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            await asyncio.sleep(0.5)  # some tries
            assert sorted(one.name for one in files.iterdir() if not one.name.endswith(".part")) == [file["id"]]
            filler.unlink()
            while (batch := (await client.get(path)).json())["status"] != "completed":  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        output = (await client.get(f"/v1/files/{batch['output_file_id']}/content")).text.splitlines()
    assert len(output) == 100
    assert {one.name for one in files.iterdir()} == {file["id"], batch["output_file_id"]}


async def test_a_disk_that_is_full_from_the_start(text_model: TextModel, small_disk: Path) -> None:
    filler = fill(small_disk)
    backend = ScriptedBackend(encode(text_model, "hello"))
    async with stateful_gateway(text_model, backend, small_disk) as gateway:
        body = {"model": "tiny", "prompt": "hi"}
        assert (await gateway.client.post("/v1/completions", json=body)).status_code == 200
        refused = await gateway.client.get("/v1/files")
        assert (refused.status_code, refused.json()["error"]["code"]) == (507, "storage_full")
        filler.unlink()
        assert (await gateway.client.get("/v1/files")).status_code == 200


async def test_the_cache_on_a_full_disk(small_disk: Path) -> None:
    level = DiskLevel(small_disk / "answers", max_bytes=NUM_BYTES, ttl_s=100, max_entry_bytes=1 << 20)
    await level.start()
    await level.put(bytes(32), b"before")
    filler = fill(small_disk)
    await level.put(b"\x01" * 32, bytes(50_000))
    assert await level.get(b"\x01" * 32) is None
    assert await level.get(bytes(32)) == b"before"
    filler.unlink()
    level._paused_until_s = 0.0
    await level.put(b"\x01" * 32, bytes(50_000))
    assert await level.get(b"\x01" * 32) == bytes(50_000)
    await level.stop()
