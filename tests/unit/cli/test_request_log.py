"""The request log's writer: lines of JSON, and no server that waits for whoever reads them."""

import io
import json
import os
import threading
import time
from contextlib import suppress

import pytest

from localmoe.cli import request_log
from localmoe.cli.request_log import RequestLogWriter


def test_lines_are_json() -> None:
    stream = io.StringIO()
    writer = RequestLogWriter(stream)
    writer.log.info("request", id="a\nb", status=200)
    writer.log.debug("not shown")
    writer.stop()
    (line,) = stream.getvalue().splitlines()
    fields = json.loads(line)
    assert (fields["event"], fields["id"], fields["status"]) == ("request", "a\nb", 200)
    assert fields["timestamp"].endswith("Z")


def test_nobody_who_does_not_read_stops_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request_log, "_MAX_WAITING_LINES", 100)
    monkeypatch.setattr(request_log, "_STOP_S", 0.1)
    reader, pipe = os.pipe()
    fill(pipe)
    with os.fdopen(pipe, "w") as stream:
        writer = RequestLogWriter(stream)
        started_s = time.monotonic()
        for _ in range(3000):
            writer.log.info("request", text="x" * 500)
        writer.stop()
        assert time.monotonic() - started_s < 5
        lines: list[str] = []
        with os.fdopen(reader) as read:
            reading = threading.Thread(target=lambda: lines.extend(read))
            reading.start()
            while writer._lines.qsize():
                time.sleep(0.01)
            writer.log.info("last")
            writer.stop()
            writer._thread.join(10)
            stream.close()
            reading.join(10)
    assert any("lines were dropped" in line for line in lines)
    assert all(json.loads(line) for line in lines)
    assert json.loads(lines[-1])["event"] == "last" or "dropped" in lines[-1]


def fill(pipe: int) -> None:
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        while True:
            os.write(pipe, b'{"event": "before"}\n')
    os.set_blocking(pipe, True)


def test_a_reader_that_is_gone_is_no_trouble() -> None:
    reader, pipe = os.pipe()
    os.close(reader)
    with os.fdopen(pipe, "w") as stream:
        writer = RequestLogWriter(stream)
        writer.log.info("request")
        writer._thread.join(5)
        assert not writer._thread.is_alive()
        writer.log.info("request")
        writer.stop()
        with pytest.raises(BrokenPipeError):
            stream.close()
