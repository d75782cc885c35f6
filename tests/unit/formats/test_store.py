"""The expert store: what is written reads back, and damage is found."""

import os
import threading
from pathlib import Path

import msgspec
import pytest
import torch
import xxhash
from store_samples import EXPERTS, SHAPE, dense_values, header_of, matrices, random_tensor, stored, write

from localmoe.core.errors import ChecksumError, StoreError
from localmoe.core.model import ExpertId, QkNorm, WeightFormat
from localmoe.formats.fp4 import quantize_nvfp4
from localmoe.formats.packed import pack_matrix
from localmoe.formats.store import Store
from localmoe.formats.store_layout import blob_layout, dense_format, dense_shapes
from localmoe.formats.store_writer import StoreWriter


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_everything_written_reads_back(tmp_path: Path, weights: WeightFormat) -> None:
    with Store.open(write(tmp_path / "m.store", weights)) as store:
        assert (store.shape, store.weights, store.source) == (SHAPE, weights, "a test")
        assert store.total_bytes == store.path.stat().st_size
        assert store.dense_names == dense_shapes(SHAPE).keys()
        for name, shape in dense_shapes(SHAPE).items():
            assert torch.equal(dense_values(store, name), stored(name, random_tensor(name, shape), weights))
        for expert_id in EXPERTS:
            weights_found = store.read_expert(expert_id).dequantize(torch.float32)
            for found, original in zip(weights_found, matrices(expert_id), strict=True):
                assert torch.equal(found, pack_matrix(original, weights).dequantize())
        store.check(2)
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
    # 32 * 64 elements: 1024 bytes of codes and, in blocks of 16, 128 bytes of scales a matrix. No row is padded.
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


def test_runs_begin_at_cache_lines() -> None:
    # down has 16 * 3 rows and one block: 48 bytes of scales, which end 16 short of the next line.
    shape = msgspec.structs.replace(SHAPE, hidden_size=32, expert_size=32)
    layout = blob_layout(shape, WeightFormat.MXFP4)
    assert [m.scales for m in (layout.gate, layout.up, layout.down)] == [
        slice(1536, 1568),
        slice(1600, 1632),
        slice(1664, 1696),
    ]


def test_formats_of_dense_tensors() -> None:
    shapes = dense_shapes(msgspec.structs.replace(SHAPE, qk_norm=QkNorm.HEAD))
    for weights, matrices_are, router_is in (
        (WeightFormat.MXFP4, WeightFormat.INT8, WeightFormat.BF16),
        (WeightFormat.NVFP4, WeightFormat.INT8, WeightFormat.BF16),
        (WeightFormat.INT8, WeightFormat.INT8, WeightFormat.BF16),
        (WeightFormat.BF16, WeightFormat.BF16, WeightFormat.BF16),
        (WeightFormat.F32, WeightFormat.F32, WeightFormat.F32),
    ):
        found = {name: dense_format(name, dimensions, weights) for name, dimensions in shapes.items()}
        assert {found[name] for name in found if name.endswith("norm")} == {WeightFormat.F32}
        assert found["layers.1.router"] is router_is
        assert {found[name] for name in ("embed", "head", "layers.0.q", "layers.1.o")} == {matrices_are}
    assert dense_format("layers.0.o", (64, 40), WeightFormat.INT8) is WeightFormat.BF16


def test_blob_in_the_file_is_codes_then_scales(store_path: Path) -> None:
    entry = header_of(store_path.read_bytes())["experts"][4]
    assert (entry["layer"], entry["expert"]) == (1, 1)
    quantized = [pack_matrix(matrix, WeightFormat.NVFP4) for matrix in matrices(ExpertId(1, 1))]
    expected = b"".join(m.values.numpy().tobytes() for m in quantized)
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
            store.dense_vector("layers.1.ffn_norm")
        store.read_expert(ExpertId(1, 0))
        with pytest.raises(ChecksumError) as caught:
            store.verify(lambda done, total: None)
        assert str(caught.value).count("is damaged") == 2
        assert "layer 1 expert 1" in str(caught.value)
        assert "layers.1.ffn_norm" in str(caught.value)
        with pytest.raises(ChecksumError) as caught_again:
            store.check(2)
        assert str(caught_again.value) == str(caught.value)


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
    with pytest.raises(StoreError, match="is closed"):
        store.read_expert(ExpertId(0, 0))
    with Store.open(write(store_path)) as store:
        os.truncate(store_path, size - 1)
        with pytest.raises(StoreError, match="the file has shrunk"):
            store.check(2)
        with pytest.raises(StoreError, match="the file has shrunk"):
            store.read_expert(ExpertId(1, 2))
        with pytest.raises(StoreError, match="the file has shrunk"):
            store.verify(lambda done, total: None)

        # Cut off between the look at its size and the use of its pages: an error, no SIGBUS.
        os.truncate(store_path, 4096)
        real = os.fstat
        monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((*real(fd)[:6], size, *real(fd)[7:])))
        with pytest.raises(StoreError, match="Input/output error"):
            store.dense_matrix("embed")


def test_unknown_pieces_are_named(store_path: Path) -> None:
    with Store.open(store_path) as store:
        with pytest.raises(StoreError, match="layer 2 expert 0"):
            store.read_expert(ExpertId(2, 0))
        with pytest.raises(StoreError, match="has no dense matrix 'final_norm'"):
            store.dense_matrix("final_norm")
        with pytest.raises(StoreError, match="has no dense vector 'embed'"):
            store.dense_vector("embed")
        with pytest.raises(StoreError, match="'bias'"):
            store.dense_matrix("bias")


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


def test_after_check_nothing_is_computed_again(store_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store.open(store_path) as store:
        store.check(3)
        monkeypatch.setattr(xxhash, "xxh3_64_hexdigest", lambda data: pytest.fail("computed again"))
        store.check(3)
        store.read_expert(ExpertId(1, 1))
        store.dense_matrix("embed")


def test_weights_are_views_of_the_file_that_outlive_the_store(store_path: Path, store_bytes: bytes) -> None:
    with Store.open(store_path) as store:
        weights = store.read_expert(ExpertId(0, 1))
        embed = store.dense_matrix("embed")
        again = store.read_expert(ExpertId(0, 1))
    del store
    assert weights.up.values.data_ptr() == again.up.values.data_ptr()
    for tensor in (weights.gate.values, weights.down.scales, embed.values, embed.scales):
        assert tensor.data_ptr() % 64 == 0
    expected = pack_matrix(random_tensor("embed", (100, 64)), WeightFormat.INT8)
    assert torch.equal(embed.values, expected.values)
    weights.gate.values[:] = 0  # the mapping is private
    assert store_path.read_bytes() == store_bytes


@pytest.mark.parametrize("weights", list(WeightFormat))
def test_packed_matrices_are_written_as_they_are(tmp_path: Path, weights: WeightFormat) -> None:
    direct = write(tmp_path / "direct", weights).read_bytes()
    with StoreWriter(tmp_path / "packed", shape=SHAPE, weights=weights, source="a test") as writer:
        for name, shape in dense_shapes(SHAPE).items():
            tensor = random_tensor(name, shape)
            stored_as = dense_format(name, shape, weights)
            writer.write_dense(name, pack_matrix(tensor, stored_as) if len(shape) == 2 else tensor)
        for expert_id in EXPERTS:
            writer.write_expert(expert_id, *(pack_matrix(matrix, weights) for matrix in matrices(expert_id)))
    assert (tmp_path / "packed").read_bytes() == direct
