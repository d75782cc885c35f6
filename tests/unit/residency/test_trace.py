"""Routing traces: what is read, and the line that is named where one is damaged."""

import gzip
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localmoe.core.errors import TraceError
from localmoe.residency import trace as trace_module
from localmoe.residency.trace import read_trace
from support.traces import SHARED_TRACES, shared_trace

GOOD = """\
# route_trace v1
# model=small arch=x n_layer=2 n_expert=4 n_expert_used=2
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
0,0,0,0,0,3,0.7,0,100
0,0,0,0,1,1,0.3,0,100
0,0,1,0,0,2,0.7,0,100
0,0,1,0,1,0,0.3,0,100
0,0,1,1,0,2,0.7,0,100
0,0,1,1,1,3,0.3,0,100
0,1,2,0,0,1,0.7,1,0
0,1,2,0,1,0,0.3,1,0
0,1,2,1,0,0,0.7,1,0
0,1,2,1,1,3,0.3,1,0
"""


def write(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def changed(line: int, text: str | None) -> str:
    """`GOOD` with another line of this number (from 1), or without it."""
    lines = GOOD.splitlines()
    lines[line - 1 : line] = [] if text is None else [text]
    return "\n".join(lines) + "\n"


def test_reads_what_is_there(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "a.csv", GOOD))
    assert (trace.model, trace.num_layers, trace.num_experts) == ("small", 2, 4)
    assert [(use.layer, use.experts.tolist(), use.is_prompt) for use in trace.uses] == [
        (0, [[3, 1], [2, 0]], True),
        (1, [[2, 3]], True),
        (0, [[1, 0]], False),
        (1, [[0, 3]], False),
    ]


def test_decoded_tokens_stay_apart(tmp_path: Path) -> None:
    text = "# n_layer=1 n_expert=4 n_expert_used=1\nturn,phase,step,layer,slot,expert\n0,1,0,0,0,1\n0,1,1,0,0,2\n"
    assert [use.experts.tolist() for use in read_trace(write(tmp_path / "a.csv", text)).uses] == [[[1]], [[2]]]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.csv"])
def test_gzip_is_known_by_its_content(tmp_path: Path, name: str) -> None:
    plain = read_trace(write(tmp_path / "plain", GOOD))
    (tmp_path / name).write_bytes(gzip.compress(GOOD.encode()))
    packed = read_trace(tmp_path / name)
    assert [use.experts.tolist() for use in packed.uses] == [use.experts.tolist() for use in plain.uses]


@pytest.mark.parametrize("name", SHARED_TRACES)
def test_recorded_traces(name: str) -> None:
    trace = read_trace(shared_trace(name))
    num_layers, num_used, num_tokens = {"gemm": (30, 6, 128), "gpt-": (36, 2, 64)}[name[:4]]
    assert (trace.num_layers, trace.num_experts) == (num_layers, 128)
    decoded = [use for use in trace.uses if not use.is_prompt]
    assert [use.layer for use in decoded] == list(range(num_layers)) * num_tokens
    assert {use.experts.shape for use in decoded} == {(1, num_used)}
    assert [use.layer for use in trace.uses if use.is_prompt] == list(range(num_layers))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "line 0: no column names"),
        ("# only comments\n", "line 1: no column names"),
        (changed(2, "# model=small n_layer=2 n_expert=4"), "line 3: no comment before it says n_expert_used="),
        (
            changed(2, "# n_layer=0 n_expert=4 n_expert_used=2"),
            "line 3: n_layer is '0', not a number from 1 to 256",
        ),
        (changed(2, "# n_layer=2 n_expert=99999 n_expert_used=2"), "line 3: n_expert is '99999'"),
        (changed(2, "# n_layer=2 n_expert=4 n_expert_used=5"), "line 3: n_expert_used is '5', not .* from 1 to 4"),
        (changed(2, "# n_layer=2 n_expert=4 n_expert_used=-1"), "line 3: n_expert_used is '-1'"),
        (changed(3, "turn,phase,step,layer,slot,weight"), "line 3: no column 'expert'"),
        (changed(3, None), "line 3: no column 'turn'"),
        (changed(5, "0,0,0,0,1,1"), "line 5: 6 fields instead of 9"),
        (changed(5, "0,0,0,0,1,4,0.3,0,100"), "line 5: expert is '4', not a number from 0 to 3"),
        (changed(5, "0,0,0,2,1,1,0.3,0,100"), "line 5: layer is '2', not a number from 0 to 1"),
        (changed(5, "0,2,0,0,1,1,0.3,0,100"), "line 5: phase is '2'"),
        (changed(5, "0,0,0,0,1,-1,0.3,0,100"), "line 5: expert is '-1'"),
        (changed(5, "0,0,0,0,1,1.0,0.3,0,100"), "line 5: expert is '1.0'"),
        (changed(5, "0,0,0,0,1,,0.3,0,100"), "line 5: expert is ''"),
        (changed(5, "0,0," + "9" * 4000 + ",0,1,1,0.3,0,100"), "line 5: step is '9999"),
        (changed(5, "0,0,0,0,1,3,0.3,0,100"), "line 5: expert 3 is named again"),
        (changed(5, "0,0,0,0,0,1,0.3,0,100"), r"line 5: .* are \(0, 0, 0, 0, 0\), but .* be \(0, 0, 0, 0, 1\)"),
        (changed(5, None), r"line 5: .* are \(0, 0, 1, 0, 0\), but .* be \(0, 0, 0, 0, 1\)"),
        (changed(5, "x" * 5000), "line 5: longer than 4096 bytes"),
        (changed(5, "0,0,0,0,1,٣,0.3,0,100"), "line 5: not plain text"),
        (changed(5, "\0" * 20), "line 5: 1 fields instead of 9"),
        (changed(13, None), "line 12: the trace ends within a token, after 1 of its 2 experts"),
        ("\n".join(GOOD.splitlines()[:9]), "line 9: the trace ends without a decoded token"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    with pytest.raises(TraceError, match=rf"a\.csv: {complaint}"):
        read_trace(write(tmp_path / "a.csv", text))


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"none\.csv: cannot be read: No such file"):
        read_trace(tmp_path / "none.csv")
    with pytest.raises(TraceError, match="cannot be read: Is a directory"):
        read_trace(tmp_path)


def test_a_truncated_gzip_file(tmp_path: Path) -> None:
    packed = gzip.compress(GOOD.encode())
    (tmp_path / "a.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(TraceError, match=r"a\.gz: line \d+: the gzip file is damaged"):
        read_trace(tmp_path / "a.gz")


def test_a_gzip_file_of_other_bytes(tmp_path: Path) -> None:
    packed = bytearray(gzip.compress(GOOD.encode()))
    packed[-6] ^= 1  # in the checksum
    (tmp_path / "a.gz").write_bytes(packed)
    with pytest.raises(TraceError, match=r"a\.gz: .*CRC"):
        read_trace(tmp_path / "a.gz")


def test_what_unpacks_to_more_than_allowed_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "MAX_TRACE_BYTES", 1 << 16)
    (tmp_path / "a.gz").write_bytes(gzip.compress(GOOD.encode() + b"# nothing\n" * 100_000))
    with pytest.raises(TraceError, match="larger than 65536 bytes"):
        read_trace(tmp_path / "a.gz")


@settings(deadline=None, max_examples=150)
@given(position=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255), is_packed=st.booleans())
def test_any_changed_byte_is_read_or_named(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int, is_packed: bool
) -> None:
    raw = bytearray(gzip.compress(GOOD.encode()) if is_packed else GOOD.encode())
    raw[position % len(raw)] = byte
    path = tmp_path_factory.getbasetemp() / "changed"
    path.write_bytes(raw)
    try:
        trace = read_trace(path)
    except TraceError:
        return
    assert all(0 <= use.layer < trace.num_layers for use in trace.uses)
    assert all(use.experts.max() < trace.num_experts for use in trace.uses)
