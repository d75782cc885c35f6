"""Checkpoint directories: what is written reads back; what is wrong is named; nothing outside is opened."""

import json
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from localmoe.core.errors import CheckpointError
from localmoe.formats.checkpoint import INDEX_FILE, Checkpoint, write_shards
from localmoe.formats.files import MAX_FILE_BYTES

TENSORS = {
    "a": torch.arange(6, dtype=torch.bfloat16).view(2, 3),
    "b": torch.ones(4),
    "c": torch.zeros(5, dtype=torch.uint8),
}


@pytest.fixture
def single(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "auto_map": {"AutoModel": "evil.Model"}}')
    save_file(TENSORS, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    write_shards(tmp_path, TENSORS.items(), shard_bytes=21)
    return tmp_path


def check_tensors(checkpoint: Checkpoint) -> None:
    assert checkpoint.names == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert checkpoint.shape_of(name) == tensor.shape
        assert checkpoint.read(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name), tensor)


def test_single_file(single: Path) -> None:
    checkpoint = Checkpoint.open(single)
    check_tensors(checkpoint)
    assert checkpoint.config["model_type"] == "llama"
    assert checkpoint.source == f"{single.name} (llama)"
    with pytest.raises(CheckpointError, match="no tensor 'd'"):
        checkpoint.read("d")
    with pytest.raises(CheckpointError, match="no tensor 'd'"):
        checkpoint.shape_of("d")


def test_shards(sharded: Path) -> None:
    shards = sorted(file.name for file in sharded.glob("*.safetensors"))
    assert shards == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert not list(sharded.glob("*.part"))
    assert json.loads((sharded / INDEX_FILE).read_text())["metadata"]["total_size"] == 33
    checkpoint = Checkpoint.open(sharded)
    check_tensors(checkpoint)


def save(path: Path, content: bytes | str) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def header(document: object, data_bytes: int = 0) -> bytes:
    raw = json.dumps(document).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(data_bytes)


def entry(begin: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_WEIGHTS = {
    "empty": b"",
    "no header": b"\0" * 8,
    "header beyond the end": struct.pack("<Q", 2**20) + b"{}",
    "huge header": struct.pack("<Q", 2**63) + b"{}",
    "not json": struct.pack("<Q", 2) + b"{x",
    "extent beyond the end": header({"a": entry(0, 64, [16])}, 32),
    "shape and extent differ": header({"a": entry(0, 32, [16])}, 32),
    "overlap": header({"a": entry(0, 32, [8]), "b": entry(0, 32, [8])}, 32),
    "negative": header({"a": entry(-32, 0, [8])}, 32),
    "huge shape": header({"a": entry(0, 32, [2**62, 2**62])}, 32),
    "unknown dtype": header({"a": entry(0, 32, [8], "F99")}, 32),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_damaged_weights(case: str, single: Path) -> None:
    save(single / "model.safetensors", BAD_WEIGHTS[case])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a readable safetensors file: "):
        Checkpoint.open(single)


BAD_JSON: dict[str, tuple[bytes | str, str]] = {
    "not json": ("{", "not valid JSON"),
    "not utf-8": (b'{"a": "\xff"}', "not UTF-8"),
    "a list": ("[]", "not an object"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "large": (b" " * (MAX_FILE_BYTES + 1), "larger than"),
}


@pytest.mark.parametrize("case", BAD_JSON)
@pytest.mark.parametrize("file", ["config.json", INDEX_FILE])
def test_damaged_json(case: str, file: str, sharded: Path) -> None:
    content, reason = BAD_JSON[case]
    save(sharded / file, content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        Checkpoint.open(sharded)
    assert str(caught.value).startswith(f"{sharded / file}: ")


@pytest.mark.parametrize(
    "shard",
    [
        "../model.safetensors",
        "/etc/model.safetensors",
        "sub/model.safetensors",
        "..\\model.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "a\0.safetensors",
        "",
        7,
        None,
    ],
)
def test_index_names_only_plain_files(shard: object, sharded: Path) -> None:
    save(sharded / INDEX_FILE, json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="only the plain name"):
        Checkpoint.open(sharded)


@pytest.mark.parametrize("document", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_index_without_entries(document: object, sharded: Path) -> None:
    save(sharded / INDEX_FILE, json.dumps(document))
    with pytest.raises(CheckpointError, match="has no weight_map"):
        Checkpoint.open(sharded)


def _drop_shard(path: Path) -> None:
    (path / "model-00002-of-00002.safetensors").unlink()


def _index_a_stranger(path: Path) -> None:
    weight_map = dict.fromkeys([*TENSORS, "stranger"], "model-00001-of-00002.safetensors")
    save(path / INDEX_FILE, json.dumps({"weight_map": weight_map}))


def _only_pickles(path: Path) -> None:
    for file in [*path.glob("*.safetensors"), path / INDEX_FILE]:
        file.unlink()
    save(path / "pytorch_model.bin", b"")


def _nothing(path: Path) -> None:
    _only_pickles(path)
    (path / "pytorch_model.bin").unlink()


def _no_config(path: Path) -> None:
    (path / "config.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_drop_shard, "1 of 2 shards are missing: model-00002-of-00002.safetensors"),
        (_index_a_stranger, "not in the shards that the index names: b, c, stranger"),
        (_only_pickles, r"holds pytorch_model\.bin but no safetensors; pickled weights run code"),
        (_nothing, r"holds neither model\.safetensors nor"),
        (_no_config, r"config\.json: cannot be read: No such file"),
    ],
)
def test_incomplete_directories(damage: Callable[[Path], None], reason: str, sharded: Path) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError, match=reason):
        Checkpoint.open(sharded)
