"""Servers of somebody else's as processes of ours: what they print, and what they leave behind."""

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

import pytest

from localmoe.backends.process import GuardedProcess
from support.server import check_gone


class FakeClosedTerminal:
    """Nobody reads it any more."""

    def write(self, _: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


async def test_what_nobody_reads_stops_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", FakeClosedTerminal())
    chatter = "for number in range(20_000): print('a line of some fifty characters, which is no more', number)"
    process = await GuardedProcess.start([sys.executable, "-c", chatter], name="chatter")
    async with asyncio.timeout(30):
        assert await process.wait() == "exit status 0"
    assert (await process.output.last_lines()).endswith("no more 19999")
    await process.stop()


async def test_being_told_to_stop_again_and_again_leaves_nobody_behind(tmp_path: Path) -> None:
    """Also in the moment in which the server has ended and what it started has not."""
    chain = tmp_path / "chain.py"
    chain.write_text(
        "import os, subprocess, sys, time\n"
        "left = int(sys.argv[1])\n"
        "open(sys.argv[2], 'a').write(f'{os.getpid()}\\n')\n"
        "if left: subprocess.Popen([sys.executable, '-S', *sys.argv[:1], str(left - 1), sys.argv[2]],"
        " start_new_session=True)\n"
        "while left < 5: time.sleep(1)\n"
        "while len(open(sys.argv[2]).readlines()) < 6: time.sleep(0.01)\n"
    )
    pids = tmp_path / "pids"
    process = await GuardedProcess.start([sys.executable, "-S", str(chain), "5", str(pids)], name="chain")

    async def keep_telling() -> None:
        while not pids.exists() or len(pids.read_text().splitlines()) < 6:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        with contextlib.suppress(ProcessLookupError):
            while True:
                os.kill(process.pid, signal.SIGTERM)
                await asyncio.sleep(0)

    telling = asyncio.create_task(keep_telling())
    async with asyncio.timeout(30):
        await process.wait()
    telling.cancel()
    await asyncio.gather(telling, return_exceptions=True)
    await process.stop()
    for pid in pids.read_text().split():
        check_gone(int(pid))


async def test_children_that_end_are_noticed_though_nobody_wanted_to_know() -> None:
    """Whether a signal is ignored is inherited."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        process = await GuardedProcess.start([sys.executable, "-S", "-c", "raise SystemExit(3)"], name="short")
    finally:
        signal.signal(signal.SIGCHLD, before)
    async with asyncio.timeout(30):
        assert await process.wait() == "exit status 3"
    await process.stop()


async def test_an_interrupted_guard_still_guards(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    code = (
        "import os, signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sleep = [sys.executable, '-S', '-c', 'import time; time.sleep(60)']\n"
        "child = subprocess.Popen(sleep, start_new_session=True)\n"
        "open(sys.argv[1], 'w').write(f'{os.getpid()} {child.pid}\\n')\n"
        "time.sleep(60)\n"
    )
    process = await GuardedProcess.start([sys.executable, "-S", "-c", code, str(pids)], name="two")
    async with asyncio.timeout(30):
        while not pids.exists() or not pids.read_text().endswith("\n"):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    await process.stop()
    for pid in pids.read_text().split():
        check_gone(int(pid))
