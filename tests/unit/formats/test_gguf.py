"""Honest files read back exactly; damaged ones are refused by name, before anything large is allocated."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from localmoe.core.errors import CheckpointError
from localmoe.core.model import WeightFormat
from localmoe.formats.gguf import MAX_HEADER_BYTES, GGUFFile


def write_honest(path: Path) -> dict[str, np.ndarray]:
    """A small file with every kind of metadata and three kinds of tensors; returns what should be read."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.u32", 7)
    writer.add_float32("a.f32", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_array("a.strings", ["x", "ä", ""])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.bools", [True, False])
    writer.add_array("a.nested", [[1, 2], [3]])
    expected = {}
    for name, shape, kind in [
        ("f32", (3, 64), gguf.GGMLQuantizationType.F32),
        ("f16", (2, 2, 32), gguf.GGMLQuantizationType.F16),
        ("q8", (4, 64), gguf.GGMLQuantizationType.Q8_0),
        ("q4", (40, 64), gguf.GGMLQuantizationType.Q4_1),
    ]:
        raw = gguf.quants.quantize(rng.standard_normal(shape, dtype=np.float32), kind)
        expected[name] = gguf.quants.dequantize(raw, kind).reshape(shape)
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def test_reads_what_the_library_wrote(tmp_path: Path) -> None:
    expected = write_honest(tmp_path / "m.gguf")
    file = GGUFFile.open(tmp_path / "m.gguf")
    assert file.metadata["general.architecture"] == "llama"
    assert (file.metadata["a.u32"], file.metadata["a.f32"], file.metadata["a.bool"]) == (7, 0.5, True)
    assert file.metadata["a.strings"] == ["x", "ä", ""]
    assert list(file.metadata["a.ints"]) == [1, -2, 3]
    assert list(file.metadata["a.bools"]) == [True, False]
    assert [list(inner) for inner in file.metadata["a.nested"]] == [[1, 2], [3]]
    assert set(file.tensors) == set(expected)
    for name, values in expected.items():
        tensor = file.read(name)
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, torch.from_numpy(values)), name
    with pytest.raises(CheckpointError, match="no tensor 'nope'"):
        file.read("nope")


# Hand-made bytes, for saying things that the library's writer would not.


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return u64(len(raw)) + raw


def header(*, version: int = 3, num_tensors: int = 0, num_values: int = 0, magic: bytes = b"GGUF") -> bytes:
    return magic + u32(version) + u64(num_tensors) + u64(num_values)


def value(key: str | bytes, kind: int, body: bytes) -> bytes:
    return string(key) + u32(kind) + body


def tensor(name: str = "t", dims: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0) -> bytes:
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(kind) + u64(offset)


def with_values(*values: bytes) -> bytes:
    return header(num_values=len(values)) + b"".join(values)


def with_tensors(*tensors: bytes, data_bytes: int = 64) -> bytes:
    head = header(num_tensors=len(tensors)) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data_bytes)


HUGE = 2**63
F32, I8, U8, BOOL, STRING, ARRAY = 6, 1, 0, 7, 8, 9

DAMAGED = {
    "empty": (b"", "magic number needs 4 bytes where 0 are left"),
    "not gguf": (header(magic=b"GGML"), "does not begin with the bytes GGUF"),
    "version 1": (header(version=1), "GGUF version 1 is not supported"),
    "version 4": (header(version=4), "GGUF version 4 is not supported"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "huge value count": (header(num_values=HUGE), f"the metadata claims {HUGE} entries"),
    "huge tensor count": (header(num_tensors=HUGE), f"tensor table claims {HUGE} entries"),
    "huge key": (with_values(u64(HUGE) + bytes(40)), f"key claims {HUGE} bytes"),
    "key beyond the end": (with_values(u64(1000) + bytes(40)), "needs 1000 bytes where 40 are left"),
    "key not utf-8": (with_values(value(b"\xff", U8, b"\1")), "key is not UTF-8"),
    "huge string": (with_values(value("k", STRING, u64(HUGE))), f"'k' claims {HUGE} bytes"),
    "string beyond the end": (with_values(value("k", STRING, u64(5) + b"abc")), "needs 5 bytes where 3 are left"),
    "string not utf-8": (with_values(value("k", STRING, string(b"\xff"))), "'k' is not UTF-8"),
    "unknown value type": (with_values(value("k", 13, bytes(8))), "'k' has the unknown type 13"),
    "boolean 2": (with_values(value("k", BOOL, b"\2")), "boolean with the value 2"),
    "booleans 2": (with_values(value("k", ARRAY, u32(BOOL) + u64(2) + b"\0\2")), "boolean with the value 2"),
    "duplicate key": (with_values(value("k", U8, b"\1"), value("k", U8, b"\1")), "'k' occurs twice"),
    "unknown element type": (with_values(value("k", ARRAY, u32(13) + u64(1) + bytes(8))), "unknown type 13"),
    "huge array of numbers": (with_values(value("k", ARRAY, u32(F32) + u64(HUGE))), f"'k' claims {HUGE} entries"),
    "huge array of strings": (with_values(value("k", ARRAY, u32(STRING) + u64(2**40))), "entries"),
    "huge array of arrays": (with_values(value("k", ARRAY, u32(ARRAY) + u64(2**40))), "entries"),
    "huge inner array": (
        with_values(value("k", ARRAY, u32(ARRAY) + u64(1) + u32(I8) + u64(HUGE))),
        f"'k' claims {HUGE} entries",
    ),
    "array nested too deep": (
        with_values(value("k", ARRAY, (u32(ARRAY) + u64(1)) * 5000 + u32(U8) + u64(0))),
        "more than 4 deep",
    ),
    "alignment 0": (with_values(value("general.alignment", 4, u32(0))), "general.alignment is 0"),
    "alignment 24": (with_values(value("general.alignment", 4, u32(24))), "general.alignment is 24"),
    "alignment huge": (with_values(value("general.alignment", 10, u64(2**62))), "general.alignment is"),
    "alignment text": (with_values(value("general.alignment", STRING, string("x" * 999))), "general.alignment is"),
    "alignment true": (with_values(value("general.alignment", BOOL, b"\1")), "general.alignment is True"),
    "no dimensions": (with_tensors(tensor(dims=())), "'t' has 0 dimensions"),
    "too many dimensions": (with_tensors(tensor(dims=(1,) * 5)), "'t' has 5 dimensions"),
    "huge dimension count": (with_tensors(string("t") + u32(2**31) + bytes(64)), "dimensions"),
    "empty dimension": (with_tensors(tensor(dims=(8, 0))), "'t' has an empty dimension"),
    "huge dimension": (with_tensors(tensor(dims=(HUGE,))), "'t' ends at byte"),
    "product past 64 bits": (with_tensors(tensor(dims=(2**62, 4))), "'t' ends at byte"),
    "broken block": (with_tensors(tensor(dims=(48,), kind=8)), "rows of 48 values, not whole blocks of 32"),
    "unknown tensor type": (with_tensors(tensor(kind=999)), "'t' has the unknown type 999"),
    "retired tensor type": (with_tensors(tensor(kind=4)), "'t' has the unknown type 4"),
    "unaligned": (with_tensors(tensor(offset=8)), "begins at 8, not at a multiple of 32"),
    "begins beyond the end": (with_tensors(tensor(offset=2**62)), "beyond the file's"),
    "ends beyond the end": (with_tensors(tensor(dims=(17,))), "beyond the file's"),
    "overlap": (with_tensors(tensor("a", (9,)), tensor("b", offset=32), data_bytes=96), "'a' and 'b' overlap"),
    "same place": (with_tensors(tensor("a"), tensor("b")), "'a' and 'b' overlap"),
    "duplicate tensor": (with_tensors(tensor("a"), tensor("a", offset=32)), "'a' occurs twice"),
    "huge tensor name": (with_tensors(u64(HUGE) + bytes(64)), f"name claims {HUGE} bytes"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named_before_allocation(case: str, tmp_path: Path) -> None:
    content, reason = DAMAGED[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            GGUFFile.open(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ")
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 600
    assert peak_bytes < 2**20


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = tmp_path / "m.gguf"
    write_honest(whole)
    content = whole.read_bytes()
    end_bytes = max(t.offset_bytes + t.num_bytes for t in GGUFFile.open(whole).tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in range(end_bytes):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf: "):
            GGUFFile.open(cut)


def test_every_flipped_header_byte_is_read_or_refused(tmp_path: Path) -> None:
    whole = tmp_path / "m.gguf"
    write_honest(whole)
    content = whole.read_bytes()
    header_bytes = min(t.offset_bytes for t in GGUFFile.open(whole).tensors.values())
    flipped = tmp_path / "flipped.gguf"
    num_refused = 0
    for position in range(header_bytes):
        flipped.write_bytes(content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :])
        try:
            GGUFFile.open(flipped)
        except CheckpointError:
            num_refused += 1
    assert num_refused > header_bytes // 2


def test_header_larger_than_the_bound(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    with path.open("wb") as file:
        file.write(with_values(value("k", ARRAY, u32(U8) + u64(MAX_HEADER_BYTES))))
        file.truncate(2 * MAX_HEADER_BYTES)
    with pytest.raises(CheckpointError, match="are left"):
        GGUFFile.open(path)


def _remove(path: Path) -> None:
    path.unlink()


def _shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(("damage", "reason"), [(_remove, "cannot be read"), (_shorten, "became shorter")])
def test_file_that_changes_after_opening(damage: Callable[[Path], None], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(with_tensors(tensor(dims=(16,))))
    file = GGUFFile.open(path)
    damage(path)
    with pytest.raises(CheckpointError, match=reason):
        file.read("t")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No such file"):
        GGUFFile.open(tmp_path / "no.gguf")


def test_integer_tensor_is_not_dequantised(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(with_tensors(tensor(kind=24)))
    with pytest.raises(CheckpointError, match="stored as I8"):
        GGUFFile.open(path).read("t")


# Matrices that are taken over as they are.


@pytest.fixture
def packed_file(tmp_path: Path) -> GGUFFile:
    """Random blocks: a stack and a matrix in MXFP4, a stack and a matrix in Q8_0, and others."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "p.gguf", "olmoe")
    for name, shape in [("mx3", (3, 19, 64)), ("mx2", (32, 96)), ("q3", (3, 19, 64)), ("q2", (32, 96))]:
        *rows, columns = shape
        block_bytes, kind = (17, "MXFP4") if name.startswith("mx") else (34, "Q8_0")
        blocks = rng.integers(0, 256, (*rows, columns // 32, block_bytes), dtype=np.uint8)
        if kind == "MXFP4":
            blocks[..., 0] = rng.integers(2, 250, blocks.shape[:-1])
        else:
            blocks[..., 1] &= 0xBF  # no NaN, nor infinity
            blocks[..., 2] = 0x80  # -128, which our own rounding never gives
        writer.add_tensor(name, blocks.reshape(*rows, -1), raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("vector", np.zeros((1, 34), np.uint8)[0], raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("f32", np.ones((3, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile.open(tmp_path / "p.gguf")


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("mx2", WeightFormat.MXFP4),
        ("mx3", WeightFormat.MXFP4),
        ("q2", WeightFormat.INT8),
        ("q3", WeightFormat.INT8),
    ],
)
def test_matrix_is_taken_over_as_it_is(packed_file: GGUFFile, name: str, weights: WeightFormat) -> None:
    values = packed_file.read(name)
    for index in [None] if values.dim() == 2 else range(3):
        packed = packed_file.read_packed(name, index)
        expected = values if index is None else values[index]
        assert (packed.format, packed.shape) == (weights, expected.shape)
        assert torch.equal(packed.dequantize(), expected)


def test_one_matrix_of_a_stack_is_read_alone(packed_file: GGUFFile, monkeypatch: pytest.MonkeyPatch) -> None:
    real = np.fromfile
    counts: list[int] = []

    def fromfile(path: Path, dtype: type, count: int, *, offset: int) -> np.ndarray:
        counts.append(count)
        return real(path, dtype, count, offset=offset)

    monkeypatch.setattr(np, "fromfile", fromfile)
    packed_file.read_packed("mx3", 2)
    assert counts == [19 * 2 * 17]


@pytest.mark.parametrize(
    ("name", "index", "reason"),
    [
        ("mx3", None, "no matrix at index None"),
        ("mx3", 3, "no matrix at index 3"),
        ("mx3", -1, "no matrix at index -1"),
        ("mx2", 0, "no matrix at index 0"),
        ("vector", None, "no matrix at index None"),
        ("f32", None, "stored as F32, which is not taken over"),
        ("nope", None, "no tensor 'nope'"),
    ],
)
def test_matrix_that_is_not_there_is_named(
    packed_file: GGUFFile, name: str, index: int | None, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        packed_file.read_packed(name, index)


def test_stack_that_is_cut_off_after_opening(packed_file: GGUFFile) -> None:
    tensor = packed_file.tensors["mx3"]
    with packed_file.path.open("r+b") as file:
        file.truncate(tensor.offset_bytes + tensor.num_bytes - 1)
    packed_file.read_packed("mx3", 1)
    with pytest.raises(CheckpointError, match="became shorter"):
        packed_file.read_packed("mx3", 2)


def test_scale_that_is_nan_does_not_reach_a_store(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "n.gguf", "olmoe")
    blocks = np.full((16, 17), 0xFF, np.uint8)
    writer.add_tensor("t", blocks, raw_dtype=gguf.GGMLQuantizationType.MXFP4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="NaN"):
        GGUFFile.open(tmp_path / "n.gguf").read_packed("t").check_finite()
