"""`localmoe inspect`, over a server that always says the same."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import msgspec
import pytest

from localmoe.cli import inspect
from localmoe.cli.inspect import heat_strip
from localmoe.core.errors import BackendUnavailableError, EngineFaultError, InvalidRequestError
from localmoe.core.inspection import Inspection, InspectionList, LayerTimes
from support.inspections import make_inspection, tier_state


@contextmanager
def server(*inspections: Inspection, status: int = 200, body: bytes | None = None) -> Iterator[str]:
    content = msgspec.json.encode(InspectionList(data=list(inspections))) if body is None else body

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/experts"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            """Be quiet."""

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def rows(text: str) -> list[list[str]]:
    """The cells of the tables' rows."""
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if "│" in line]


def prose(text: str) -> str:
    """What stands beside the tables, whatever the width."""
    return " ".join(" ".join(line for line in text.splitlines() if line[:1].isalnum()).split())


def test_experts(capsys: pytest.CaptureFixture[str]) -> None:
    with server(make_inspection()) as url:
        inspect.experts(url=url)
    found = capsys.readouterr().out
    assert rows(found) == [
        ["0", "3", "16", "50%", "█·▄▄"],
        ["1", "2", "16", "81%", "▁▁▁█"],
    ]
    for words in (
        "tiny: 5 of 8 experts are in memory, 6 fit, 3.0 MB each",
        "30 found in memory (75.0%), 10 read from the disk; 7 evictions",
        "read ahead: 9; 5 useful, 1 late, 3 wasted",
    ):
        assert words in prose(found)


def test_experts_on_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    tiers = tier_state(
        num_experts=8,
        num_slots=3,
        num_present=2,
        hits=10,
        misses=10,
        device_slots=4,
        num_on_device=3,
        device_hits=60,
        device_fetches=5,
        device_evictions=7,
        copies_in=15,
        copies_out=6,
    )
    with server(make_inspection(tiers=tiers, placement=[["device", "ram"] * 2, ["disk", "device"] * 2])) as url:
        inspect.experts(url=url)
    found = capsys.readouterr().out
    assert [row[1] for row in rows(found)] == ["4", "2"]
    for words in (
        "on the device: 3 experts, 4 fit; 60 uses found one there (75.0%), 5 fetched one from memory",
        "copies: 15 to the device, 6 back; 7 evictions there",
    ):
        assert words in prose(found)


def test_experts_all_in_memory_and_never_used(capsys: pytest.CaptureFixture[str]) -> None:
    nothing = make_inspection(tiers=None, links=[], heat=[[0] * 4] * 2, placement=[["ram"] * 4] * 2)
    with server(nothing) as url:
        inspect.experts(url=url)
    found = capsys.readouterr().out
    assert "tiny: all 8 experts are in memory, 3.0 MB each" in prose(found)
    assert rows(found) == [[str(layer), "4", "0", "0%", "····"] for layer in range(2)]


@pytest.mark.parametrize(("num_experts", "num_blocks", "size"), [(4, 8, 1), (64, 40, 2), (128, 40, 4), (7, 3, 3)])
def test_a_strip_fits_and_shows_the_hottest(num_experts: int, num_blocks: int, size: int) -> None:
    heat = [10] * num_experts
    heat[num_experts - 1] = 1000
    strip = heat_strip(heat, ["ram"] * num_experts, num_blocks)
    assert len(strip.plain) == -(-num_experts // size) <= num_blocks
    assert strip.plain == "▁" * (len(strip.plain) - 1) + "█"


def test_a_strip_tells_what_is_in_memory() -> None:
    strip = heat_strip([1, 2, 3, 4], ["disk", "ram", "gpu", "disk"], 8)
    near = {strip.plain[span.start] for span in strip.spans if "green" in str(span.style)}
    assert near == {strip.plain[1], strip.plain[2]}


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with server(make_inspection()) as url:
        inspect.memory(url=url)
    found = capsys.readouterr().out
    assert "50.0 MB may be used; the process holds 70.0 MB" in prose(found)
    assert rows(found) == [
        ["kv cache", "10.0 MB", "2.5 MB", "25%"],
        ["workspace", "4.0 MB", "", ""],
        ["total", "14.0 MB", "", ""],
    ]


def test_bandwidth(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    with server(make_inspection()) as url:
        inspect.bandwidth(url=url)
    assert rows(capsys.readouterr().out) == [["disk → ram", "12", "36.0 MB", "3.0 MB", "0.0 s", "2.00", "0.0 s"]]
    with server(make_inspection(tiers=None, links=[])) as url:
        inspect.bandwidth(url=url)
    assert "all experts are in memory; nothing is moved" in capsys.readouterr().out


def test_latency(capsys: pytest.CaptureFixture[str]) -> None:
    prefill = LayerTimes(phase="prefill", num_steps=1, compute_s=[0.0, 0.0], stall_s=[0.0, 0.0])
    decode = make_inspection().layer_times[0]
    with server(make_inspection(layer_times=[decode, prefill])) as url:
        inspect.latency(url=url)
    found = capsys.readouterr().out
    assert "tiny: decode, means of 20 steps, milliseconds" in found
    assert rows(found) == [
        ["0", "1.00", "3.00", "75%"],
        ["1", "2.00", "0.00", "0%"],
        ["all", "3.00", "3.00", "50%"],
        ["0", "0.00", "0.00", "0%"],
        ["1", "0.00", "0.00", "0%"],
        ["all", "0.00", "0.00", "0%"],
    ]
    with server(make_inspection(layer_times=[])) as url:
        inspect.latency(url=url)
    assert "no step has run yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "fields"),
    [
        (inspect.experts, {"num_layers", "num_experts", "expert_bytes", "tiers", "heat", "placement"}),
        (inspect.memory, {"memory"}),
        (inspect.bandwidth, {"links"}),
        (inspect.latency, {"layer_times"}),
    ],
)
def test_json_has_a_line_for_each_model(
    capsys: pytest.CaptureFixture[str], command: Any, fields: set[str]
) -> None:
    with server(make_inspection(), make_inspection(model="other")) as url:
        command(url=url, as_json=True)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["model"] for line in lines] == ["tiny", "other"]
    whole = json.loads(msgspec.json.encode(make_inspection()))
    for line in lines:
        assert set(line) == {"model", *fields}
        assert all(line[field] == whole[field] for field in fields)


def test_no_server_says_how_to_start_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with server() as url:
        port = url.rpartition(":")[2]
    monkeypatch.setenv("LOCALMOE_PORT", port)  # nobody is there any more
    with pytest.raises(BackendUnavailableError, match=rf"127.0.0.1:{port}: .*`localmoe serve`.* --url"):
        inspect.memory()


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "nonsense", "ftp://127.0.0.1", "http://127.0.0.1:99999999", "http://[::1"]
)
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(BackendUnavailableError) as caught:
        inspect.memory(url=url)
    assert url in str(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "error", "words"),
    [
        (503, b'{"error": {"message": "the engine is starting"}}', EngineFaultError, "the engine is starting"),
        (404, b'{"error": {"message": "no such route"}}', InvalidRequestError, "no such route"),
        (404, b"<html>", InvalidRequestError, "HTTP 404"),
        (200, b"[1]", EngineFaultError, "something else than a list of models"),
        (200, b"\xff", EngineFaultError, "something else than a list of models"),
    ],
)
def test_what_a_server_refuses_or_does_not_know(
    status: int, body: bytes, error: type[Exception], words: str
) -> None:
    with server(status=status, body=body) as url, pytest.raises(error, match=words):
        inspect.latency(url=url)
