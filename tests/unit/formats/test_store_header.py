"""Headers of expert stores that lie, checksum and all, and files cut off or changed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from store_samples import PREAMBLE, header_of

from localmoe.core.errors import StoreError
from localmoe.formats.store import Store
from localmoe.formats.store_layout import MAX_HEADER_BYTES

Mutation = Callable[[dict[str, Any]], None]


def with_header(content: bytes, encoded: bytes) -> bytes:
    """The file with another header of the same length and a right checksum."""
    magic, version, room, _ = PREAMBLE.unpack(content[:32])
    encoded = encoded.ljust(room)
    assert len(encoded) == room
    preamble = PREAMBLE.pack(magic, version, room, xxhash.xxh3_64_intdigest(encoded))
    return preamble + encoded + content[32 + room :]


def no_large_read(monkeypatch: pytest.MonkeyPatch, limit_bytes: int) -> None:
    """Reading goes through buffers that preadv is handed, so their size is what was allocated."""
    real = os.preadv

    def preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        assert sum(map(len, buffers)) <= limit_bytes
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)


def assign(*keys_and_value: Any) -> Mutation:
    """Set `header[key]...[key] = value`."""
    *keys, last, value = keys_and_value

    def mutate(header: dict[str, Any]) -> None:
        place: Any = header
        for key in keys:
            place = place[key]
        place[last] = value

    return mutate


def drop(*keys: Any) -> Mutation:
    def mutate(header: dict[str, Any]) -> None:
        place: Any = header
        for key in keys[:-1]:
            place = place[key]
        del place[keys[-1]]

    return mutate


def copy_entry(kind: str, source: int, target: int, *fields: str) -> Mutation:
    def mutate(header: dict[str, Any]) -> None:
        for field in fields:
            header[kind][target][field] = header[kind][source][field]

    return mutate


def consistent_lie_about_vocabulary(header: dict[str, Any]) -> None:
    header["shape"]["vocab_size"] = 2**31 - 1
    for entry in header["dense"]:
        if entry["name"] in ("embed", "head"):
            entry["shape"] = [2**31 - 1, 64]
            entry["num_bytes"] = 2**31 * 64 + 2**31 * 4
            entry["num_bytes"] += -entry["num_bytes"] % 4096


def shift_all(header: dict[str, Any]) -> None:
    for entry in [*header["dense"], *header["experts"]]:
        entry["offset"] += 4096


LIES: dict[str, tuple[Mutation, str]] = {
    "layout name": (assign("layout", "tiled"), "another layout"),
    "unknown format": (assign("weights", "int3"), "not valid"),
    "other format": (assign("weights", "bf16"), "its shape implies bf16"),
    "other FP4 format": (assign("weights", "mxfp4"), "tensor scales"),
    "huge layer count": (assign("shape", "num_layers", 10**12), "num_layers"),
    "large layer count": (assign("shape", "num_layers", 2**31 - 1), "262144 in all is most"),
    "wrong layer count": (assign("shape", "num_layers", 50000), "lists 6 experts"),
    "one layer more": (assign("shape", "num_layers", 3), "lists 6 experts"),
    "layers and experts swapped": (
        lambda h: h["shape"].update(num_layers=3, num_experts=2),
        "dense tensors are not those",
    ),
    "huge expert count": (assign("shape", "num_experts", 2**31 - 1), "in all is most"),
    "no layers": (assign("shape", "num_layers", 0), "num_layers"),
    "negative width": (assign("shape", "hidden_size", -64), "hidden_size"),
    "huge width": (assign("shape", "expert_size", 10**300), "expert_size|not valid"),
    "other width": (assign("shape", "hidden_size", 128), "implies"),
    "other expert width": (assign("shape", "expert_size", 64 * 3), "imply"),
    "indivisible width": (assign("shape", "hidden_size", 72), "does not divide"),
    "vocabulary": (assign("shape", "vocab_size", 101), "implies"),
    "vocabulary, consistently": (consistent_lie_about_vocabulary, "was due"),
    "more chosen than there are": (assign("shape", "top_k", 4), "contradicts itself"),
    "heads that do not divide": (assign("shape", "num_kv_heads", 3), "contradicts itself"),
    "half a pair of a head": (assign("shape", "head_dim", 15), "contradicts itself"),
    "rope": (assign("shape", "rope_theta", -1.0), "contradicts itself"),
    "text for a number": (assign("shape", "hidden_size", "64"), "not valid"),
    "shape incomplete": (drop("shape", "head_dim"), "not valid"),
    "file size": (assign("file_bytes", 2**40), "its header says"),
    "negative file size": (assign("file_bytes", -1), "not valid"),
    "unknown field": (assign("colour", "red"), "not valid"),
    "missing list": (drop("experts"), "not valid"),
    "no experts": (assign("experts", []), "lists 0 experts"),
    "no dense tensors": (assign("dense", []), "dense tensors are not those"),
    "dense tensor missing": (drop("dense", 3), "dense tensors are not those"),
    "dense tensor renamed": (assign("dense", 3, "name", "layers.7.q"), "dense tensors are not those"),
    "dense tensor twice": (copy_entry("dense", 3, 4, "name"), "dense tensors are not those"),
    "dense format": (assign("dense", 3, "format", "int8"), "implies"),
    "dense format unknown": (assign("dense", 3, "format", "x" * 50), "not valid"),
    "dense shape": (assign("dense", 0, "shape", [64, 100]), "implies"),
    "dense shape huge": (assign("dense", 0, "shape", [2**61, 64]), "implies"),
    "dense shape negative": (assign("dense", 0, "shape", [-100, -64]), "not valid"),
    "dense shape of many axes": (assign("dense", 0, "shape", [1] * 100), "implies"),
    "dense size": (assign("dense", 0, "num_bytes", 4096), "implies"),
    "dense size huge": (assign("dense", 0, "num_bytes", 2**60), "implies"),
    "dense size negative": (assign("dense", 0, "num_bytes", -4096), "not valid"),
    "dense overlap": (copy_entry("dense", 3, 4, "offset"), "was due"),
    "dense beyond the file": (assign("dense", 3, "offset", 2**50), "was due"),
    "dense offset out of range": (assign("dense", 3, "offset", 2**70), "not valid"),
    "dense in the header": (assign("dense", 0, "offset", 0), "was due"),
    "dense offset negative": (assign("dense", 0, "offset", -4096), "not valid"),
    "expert missing": (drop("experts", 2), "lists 5 experts"),
    "expert twice": (copy_entry("experts", 1, 2, "expert"), "lists an expert twice"),
    "expert of no layer": (assign("experts", 2, "layer", 2), "layer 2 expert 2 is not in"),
    "expert number": (assign("experts", 2, "expert", 2**40), "is not in the model's shape"),
    "expert number negative": (assign("experts", 2, "expert", -1), "not valid"),
    "expert size": (assign("experts", 2, "num_bytes", 8192), "imply 4096"),
    "expert size huge": (assign("experts", 2, "num_bytes", 2**62), "imply 4096"),
    "expert overlap": (copy_entry("experts", 1, 2, "offset"), "was due"),
    "expert unaligned": (assign("experts", 0, "offset", 12345), "was due"),
    "expert beyond the file": (assign("experts", 5, "offset", 2**50), "was due"),
    "everything shifted": (shift_all, "was due"),
    "checksum is no number": (assign("experts", 0, "xxh3", "g" * 16), "not valid"),
    "checksum is long": (assign("experts", 0, "xxh3", "0" * 17), "not valid"),
    "tensor scales missing": (drop("experts", 0, "tensor_scales"), "tensor scales"),
    "tensor scale zero": (assign("experts", 0, "tensor_scales", [1.0, 0.0, 1.0]), "tensor scales"),
    "tensor scale negative": (assign("experts", 0, "tensor_scales", [1.0, -1.0, 1.0]), "tensor scales"),
    "tensor scale over float32": (assign("experts", 0, "tensor_scales", [1.0, 1e39, 1.0]), "tensor scales"),
    "two tensor scales": (assign("experts", 0, "tensor_scales", [1.0, 1.0]), "not valid"),
}


@pytest.mark.parametrize(("mutate", "message"), LIES.values(), ids=LIES.keys())
def test_header_that_lies_with_a_right_checksum_is_refused(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, mutate: Mutation, message: str
) -> None:
    header = header_of(store_path.read_bytes())
    mutate(header)
    store_path.write_bytes(with_header(store_path.read_bytes(), msgspec.json.encode(header)))
    no_large_read(monkeypatch, 16384)
    with pytest.raises(StoreError, match=message) as caught:
        Store.open(store_path)
    assert str(caught.value).startswith(f"{store_path}: ")


def test_unchanged_header_written_anew_is_accepted(store_path: Path) -> None:
    """The table above would prove nothing if the way it rewrites headers were refused in itself."""
    store_path.write_bytes(
        with_header(store_path.read_bytes(), msgspec.json.encode(header_of(store_path.read_bytes())))
    )
    with Store.open(store_path) as store:
        store.verify(lambda done, total: None)


@pytest.mark.parametrize("encoded", [b"", b"[]", b"{}", b"null", b"[" * 4000, b'{"source": "\xff"}', b"\0" * 99])
def test_header_that_is_no_header_is_refused(store_path: Path, encoded: bytes) -> None:
    store_path.write_bytes(with_header(store_path.read_bytes(), encoded))
    with pytest.raises(StoreError, match="not valid"):
        Store.open(store_path)


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, b"GGUF\0\0\0\0", "is not an expert store"),
        (1, 0, "has layout version 0"),
        (1, 2, "has layout version 2"),
        (2, 0, "damaged"),
        (2, 4000, "damaged"),
        (2, 2**63, "claims a header of"),
        (2, 2**64 - 1, "claims a header of"),
        (2, MAX_HEADER_BYTES + 1, "claims a header of"),
        (3, 12345, "damaged"),
    ],
)
def test_preamble_that_lies_is_refused(
    store_path: Path, monkeypatch: pytest.MonkeyPatch, index: int, value: Any, message: str
) -> None:
    content = store_path.read_bytes()
    fields = list(PREAMBLE.unpack(content[:32]))
    fields[index] = value
    store_path.write_bytes(PREAMBLE.pack(*fields) + content[32:])
    os.truncate(store_path, MAX_HEADER_BYTES * 2)  # sparse: large enough that only the limit is in the way
    no_large_read(monkeypatch, 16384)
    with pytest.raises(StoreError, match=message):
        Store.open(store_path)


def test_header_longer_than_the_file_is_refused(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = store_path.read_bytes()
    fields = list(PREAMBLE.unpack(content[:32]))
    fields[2] = len(content) - 31
    store_path.write_bytes(PREAMBLE.pack(*fields) + content[32:])
    no_large_read(monkeypatch, 32)
    with pytest.raises(StoreError, match="claims a header of"):
        Store.open(store_path)


def test_file_cut_off_anywhere_is_refused(store_path: Path, store_bytes: bytes) -> None:
    room = PREAMBLE.unpack(store_bytes[:32])[2]
    cuts = [0, 1, 7, 8, 31, 32, 33, 100, 31 + room, 32 + room, len(store_bytes) // 2]
    for size in [*cuts, *range(len(store_bytes) - 1, room, -9973), len(store_bytes) - 4096]:
        store_path.write_bytes(store_bytes[:size])
        with pytest.raises(StoreError, match=r"m\.store: "):
            Store.open(store_path)


def test_file_with_something_after_its_end_is_refused(store_path: Path, store_bytes: bytes) -> None:
    store_path.write_bytes(store_bytes + b"\0")
    with pytest.raises(StoreError, match="its header says"):
        Store.open(store_path)


def test_gap_at_the_end_that_the_header_knows_of_is_refused(store_path: Path, store_bytes: bytes) -> None:
    header = header_of(store_bytes)
    header["file_bytes"] += 4096
    store_path.write_bytes(with_header(store_bytes, msgspec.json.encode(header)) + bytes(4096))
    with pytest.raises(StoreError, match="the extents end at byte"):
        Store.open(store_path)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_flipped_bit_anywhere_is_found(
    store_bytes: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    position = data.draw(st.one_of(st.integers(0, 9000), st.integers(0, len(store_bytes) - 1)))
    content = bytearray(store_bytes)
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    store_path = tmp_path_factory.getbasetemp() / "flipped.store"
    store_path.write_bytes(content)
    with pytest.raises(StoreError), Store.open(store_path) as store:
        store.verify(lambda done, total: None)


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", ".", "absent"):
        with pytest.raises(StoreError, match=str(tmp_path)):
            Store.open(tmp_path / name)
