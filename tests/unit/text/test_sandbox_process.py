"""A process that may be lost: it is, and the next question gets another."""

import gc
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from localmoe.core.errors import BackendUnavailableError, OverloadedError
from localmoe.text.sandbox_process import SandboxProcess

MODULE = """
import os, sys, time
from localmoe.text.sandbox_process import serve

def answer(question):
    if question == b"hang":
        while True:
            pass
    if question == b"sleep":
        time.sleep(60)
    if question == b"fill":
        return bytes(1 << 30)
    if question == b"pid":
        return str(os.getpid()).encode()
    return question[::-1]

serve(answer, cpu_s=0.2, memory_bytes=1 << 28)
"""


@pytest.fixture
def process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SandboxProcess:
    (tmp_path / "answers_backwards.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return SandboxProcess("answers_backwards", opening=b"hello", timeout_s=1.0, max_answer_bytes=1 << 24)


def pid(process: SandboxProcess) -> int:
    return int(process.ask(b"pid") or b"")


def lives(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_it_answers_one_after_the_other(process: SandboxProcess) -> None:
    assert process.open() == b"olleh"
    first = pid(process)
    large = bytes(range(256)) * 40_000
    assert process.ask(large) == large[::-1]
    assert process.ask(b"") == b""
    assert pid(process) == first


@pytest.mark.parametrize("question", [b"hang", b"sleep", b"fill", bytes((1 << 24) + 1)])
def test_what_takes_too_much_ends_it_and_the_next_gets_another(process: SandboxProcess, question: bytes) -> None:
    first = pid(process)
    assert process.ask(question) is None
    assert process.ask(b"ab") == b"ba"
    assert pid(process) != first
    assert not lives(first)


def test_one_that_was_killed_is_replaced_before_it_is_asked(process: SandboxProcess) -> None:
    first = pid(process)
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
    assert process.ask(b"ab") == b"ba"


def test_it_goes_with_whoever_asks(process: SandboxProcess) -> None:
    own = SandboxProcess("answers_backwards", opening=b"", timeout_s=1.0, max_answer_bytes=1 << 24)
    number = pid(own)
    del own
    gc.collect()
    assert not lives(number)


def test_closed_it_ends_for_good_whatever_it_is_doing(process: SandboxProcess) -> None:
    first = pid(process)
    process._timeout_s = 30.0
    with ThreadPoolExecutor(2) as threads:
        asked = threads.submit(process.ask, b"sleep")
        while not process._turn.locked():
            time.sleep(0.001)
        waits = threads.submit(process.ask, b"ab")
        started_s = time.monotonic()
        process.close()
        assert not lives(first)
        assert asked.result() is None
        with pytest.raises(BackendUnavailableError):
            waits.result()
    assert time.monotonic() - started_s < 10.0
    with pytest.raises(BackendUnavailableError):
        process.ask(b"ab")
    process.close()


def test_it_does_not_outlive_its_parent(tmp_path: Path, process: SandboxProcess) -> None:
    code = (
        "import os, signal\n"
        "from localmoe.text.sandbox_process import SandboxProcess\n"
        "process = SandboxProcess('answers_backwards', opening=b'', timeout_s=5.0, max_answer_bytes=9999)\n"
        "print(process.ask(b'pid').decode(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    number = int(said.stdout)
    fd = None
    try:
        fd = os.pidfd_open(number)
    except ProcessLookupError:
        return
    import select

    try:
        assert select.select([fd], [], [], 10)[0], "it still lives"
    finally:
        os.close(fd)


def test_one_that_cannot_be_started_is_said_so(process: SandboxProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    other = SandboxProcess("answers_backwards", opening=b"", timeout_s=1.0, max_answer_bytes=9)
    with pytest.raises(OverloadedError, match="cannot be started: No such file"):
        other.ask(b"a")
