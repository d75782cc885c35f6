"""The expert store: what is written reads back, and damage is found."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import xxhash
from store_samples import EXPERTS, SHAPE, header_of, matrices, random_tensor, write

from localmoe.core.errors import ChecksumError, StoreError
from localmoe.core.model import ExpertId, WeightFormat
from localmoe.formats.fp4 import quantize_mxfp4, quantize_nvfp4
from localmoe.formats.store import Store, StoreWriter
from localmoe.formats.store_layout import blob_layout, dense_shapes


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_everything_written_reads_back(tmp_path: Path, weights: WeightFormat) -> None:
    dense_dtype = torch.float32 if weights is WeightFormat.F32 else torch.bfloat16
    with Store.open(write(tmp_path / "m.store", weights)) as store:
        assert (store.shape, store.weights, store.source) == (SHAPE, weights, "a test")
        assert store.total_bytes == store.path.stat().st_size
        assert store.dense_names == dense_shapes(SHAPE).keys()
        for name, shape in dense_shapes(SHAPE).items():
            tensor = store.read_dense(name)
            assert tensor.dtype == dense_dtype
            assert torch.equal(tensor, random_tensor(name, shape).to(dense_dtype))
        for expert_id in EXPERTS:
            weights_found = store.read_expert(expert_id).dequantize(torch.float32)
            for found, original in zip(weights_found, matrices(expert_id), strict=True):
                if weights is WeightFormat.NVFP4:
                    expected = quantize_nvfp4(original).dequantize(torch.float32)
                elif weights is WeightFormat.MXFP4:
                    expected = quantize_mxfp4(original).dequantize(torch.float32)
                else:
                    expected = original.to(dense_dtype).float()
                assert torch.equal(found, expected)
        progress: list[tuple[int, int]] = []
        store.verify(lambda done, total: progress.append((done, total)))
        assert progress[-1][0] == progress[-1][1]
        assert [done for done, _ in progress] == sorted(done for done, _ in progress)


def test_one_expert_and_tied_embeddings_need_no_router_and_no_head(tmp_path: Path) -> None:
    shape = msgspec.structs.replace(SHAPE, num_experts=1, top_k=1, num_layers=1, tie_embeddings=True)
    store_path = tmp_path / "m.store"
    with StoreWriter(store_path, shape=shape, weights=WeightFormat.BF16, source="") as writer:
        for name, dimensions in dense_shapes(shape).items():
            writer.write_dense(name, torch.ones(dimensions))
        writer.write_expert(ExpertId(0, 0), *matrices(ExpertId(0, 0)))
    with Store.open(store_path) as store:
        assert "head" not in store.dense_names
        assert "layers.0.router" not in store.dense_names


def test_blob_layout_worked_out_by_hand() -> None:
    # 32 * 64 elements: 1024 bytes of codes and, in blocks of 16, 128 bytes of scales a matrix.
    layout = blob_layout(SHAPE, WeightFormat.NVFP4)
    assert [m.values for m in (layout.gate, layout.up, layout.down)] == [
        slice(0, 1024),
        slice(1024, 2048),
        slice(2048, 3072),
    ]
    assert [m.scales for m in (layout.gate, layout.up, layout.down)] == [
        slice(3072, 3200),
        slice(3200, 3328),
        slice(3328, 3456),
    ]
    assert (layout.down.rows, layout.down.columns, layout.num_bytes) == (64, 32, 4096)
    # BF16: 3 * 4096 bytes of values, nothing else.
    assert blob_layout(SHAPE, WeightFormat.BF16).num_bytes == 12288


def test_blob_in_the_file_is_codes_then_scales(store_path: Path) -> None:
    entry = header_of(store_path.read_bytes())["experts"][4]
    assert (entry["layer"], entry["expert"]) == (1, 1)
    quantized = [quantize_nvfp4(matrix) for matrix in matrices(ExpertId(1, 1))]
    expected = b"".join(m.codes.numpy().tobytes() for m in quantized)
    expected += b"".join(m.scales.numpy().tobytes() for m in quantized)
    assert entry["offset"] % 4096 == 0
    assert store_path.read_bytes()[entry["offset"] :][:4096] == expected.ljust(4096, b"\0")
    assert entry["tensor_scales"] == [m.tensor_scale for m in quantized]


def test_pieces_may_be_written_in_any_order(store_path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    with StoreWriter(other, shape=SHAPE, weights=WeightFormat.NVFP4, source="a test") as writer:
        for expert_id in reversed(EXPERTS):
            writer.write_expert(expert_id, *matrices(expert_id))
        for name, shape in reversed(dense_shapes(SHAPE).items()):
            writer.write_dense(name, random_tensor(name, shape))
        assert writer.written_bytes == writer.total_bytes
    assert other.read_bytes() == store_path.read_bytes()


def flip_bit(store_path: Path, offset: int) -> None:
    with store_path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


def test_damaged_pieces_are_found_at_first_read_and_by_verify(store_path: Path) -> None:
    header = header_of(store_path.read_bytes())
    norm = next(entry for entry in header["dense"] if entry["name"] == "layers.1.ffn_norm")
    flip_bit(store_path, header["experts"][4]["offset"] + 3100)
    flip_bit(store_path, norm["offset"])
    with Store.open(store_path) as store:
        with pytest.raises(ChecksumError, match="layer 1 expert 1 is damaged") as caught:
            store.read_expert(ExpertId(1, 1))
        found = xxhash.xxh3_64_hexdigest(store_path.read_bytes()[header["experts"][4]["offset"] :][:4096])
        assert f"expected {header['experts'][4]['xxh3']}, found {found}" in str(caught.value)
        assert str(store_path) in str(caught.value)
        with pytest.raises(ChecksumError, match=r"dense tensor layers\.1\.ffn_norm is damaged"):
            store.read_dense("layers.1.ffn_norm")
        store.read_expert(ExpertId(1, 0))
        with pytest.raises(ChecksumError) as caught:
            store.verify(lambda done, total: None)
        assert str(caught.value).count("is damaged") == 2
        assert "layer 1 expert 1" in str(caught.value)
        assert "layers.1.ffn_norm" in str(caught.value)


def test_checksum_is_computed_once_for_each_blob(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(store_path) as store:
        first = store.read_expert(ExpertId(0, 0)).dequantize(torch.float32)
        monkeypatch.setattr(xxhash, "xxh3_64_hexdigest", lambda data: pytest.fail("computed again"))
        second = store.read_expert(ExpertId(0, 0)).dequantize(torch.float32)
        assert all(map(torch.equal, first, second))


def test_damage_after_the_first_read_is_still_found_by_verify(store_path: Path) -> None:
    with Store.open(store_path) as store:
        store.read_expert(ExpertId(0, 0))
        flip_bit(store_path, header_of(store_path.read_bytes())["experts"][0]["offset"])
        with pytest.raises(ChecksumError, match="layer 0 expert 0"):
            store.verify(lambda done, total: None)


def test_short_reads_are_continued(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:1000]], offset))
    with Store.open(store_path) as store:
        store.verify(lambda done, total: None)


def test_shrunken_deleted_failing_and_closed_files(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(store_path) as store:
        size = store_path.stat().st_size
        store_path.unlink()
        store.read_expert(ExpertId(1, 2))  # the open file lives on
    with pytest.raises(StoreError, match="closed file"):
        store.read_expert(ExpertId(0, 0))
    with Store.open(write(store_path)) as store:
        os.truncate(store_path, size - 1)
        with pytest.raises(StoreError, match="the file has shrunk"):
            store.read_expert(ExpertId(1, 2))
        with pytest.raises(StoreError, match="the file has shrunk"):
            store.verify(lambda done, total: None)

        def failing(*_: Any) -> int:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "preadv", failing)
        with pytest.raises(StoreError, match="Input/output error"):
            store.read_dense("embed")


def test_unknown_pieces_are_named(store_path: Path) -> None:
    with Store.open(store_path) as store:
        with pytest.raises(StoreError, match="layer 2 expert 0"):
            store.read_expert(ExpertId(2, 0))
        with pytest.raises(StoreError, match="'bias'"):
            store.read_dense("bias")


def test_many_threads_may_read_at_once(store_path: Path) -> None:
    results: list[bool] = []

    def read(store: Store) -> None:
        for expert_id in EXPERTS * 5:
            found = store.read_expert(expert_id).up.dequantize(torch.float32)
            results.append(torch.equal(found, quantize_nvfp4(matrices(expert_id)[1]).dequantize(torch.float32)))

    with Store.open(store_path) as store:
        threads = [threading.Thread(target=read, args=(store,)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert results == [True] * (8 * 30)
