"""The catalog: names, conversion, checks, removal, and one builder at a time."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from localmoe.catalog.building import build_lock
from localmoe.catalog.catalog import Catalog
from localmoe.catalog.demo import upcycle_gguf
from localmoe.core.errors import (
    CheckpointError,
    ChecksumError,
    ModelBuildError,
    ModelFileError,
    ModelNotFoundError,
)
from localmoe.core.model import WeightFormat
from localmoe.formats.files import MAX_FILE_BYTES
from localmoe.formats.store import Store
from support.tiny_gguf import write_tiny_gguf


def ignore(stage: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral checkpoint directory with a tokenizer."""
    path = tmp_path_factory.mktemp("source") / "Tiny-Mixtral"
    path.mkdir()
    upcycle_gguf(write_tiny_gguf(path.parent / "tiny.gguf"), path, ignore)
    return path


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage; its files are links until they are replaced."""
    path = tmp_path / "Tiny-Mixtral"
    path.mkdir()
    for file in original.iterdir():
        (path / file.name).symlink_to(file)
    return path


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(tmp_path / "home")


def put_checkpoint(catalog: Catalog, source: Path, name: str) -> Path:
    """A model with a checkpoint and no store, as a person might put it there."""
    path = catalog.models_path / name
    path.mkdir(parents=True)
    for file in source.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def test_empty_catalog(catalog: Catalog) -> None:
    assert catalog.list() == ()
    with pytest.raises(ModelNotFoundError, match=r"model 'x' is not in .*; there are none yet; .* build-demo"):
        catalog.path("x")


NO_NAMES = ["", ".", "..", "../tiny", "a/b", "a\\b", ".hidden", "-x", "a\0", "a\n", "ä", "x" * 97, "a b", "/etc"]


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_is_no_name(name: str, catalog: Catalog, source: Path) -> None:
    put_checkpoint(catalog, source, "tiny")
    for look_up in (catalog.path, catalog.remove, lambda n: catalog.store_path(n, WeightFormat.BF16)):
        with pytest.raises(ModelNotFoundError, match="available: tiny"):
            look_up(name)
    with pytest.raises(ModelBuildError, match="cannot be a model's name; allowed are"):
        catalog.convert(source, name, WeightFormat.BF16, ignore)
    assert source.exists()


def test_convert_verify_remove(catalog: Catalog, source: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    path = catalog.convert(source, "tiny", WeightFormat.MXFP4, lambda *event: seen.append(event))
    assert path == catalog.models_path / "tiny"
    assert seen[-1][0] == "writing mxfp4.store"
    assert seen[-1][1] == seen[-1][2] > 0
    assert sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "special_tokens_map.json",
        "stores/mxfp4.store",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert [p for p in path.rglob("*") if p.is_symlink()] == [path / "checkpoint"]
    assert catalog.checkpoint_path("tiny") == path / "checkpoint"
    with Store.open(catalog.store_path("tiny", WeightFormat.MXFP4)) as store:
        assert store.weights is WeightFormat.MXFP4
        assert store.shape.num_experts == 8

    (entry,) = catalog.list()
    assert (entry.name, entry.weights, entry.has_checkpoint) == ("tiny", (WeightFormat.MXFP4,), False)
    assert entry.size_bytes == sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    (part,) = catalog.verify("tiny", ignore)
    assert part.path == catalog.store_path("tiny", WeightFormat.MXFP4)

    assert catalog.ensure_store("tiny", WeightFormat.MXFP4, ignore) == part.path
    with pytest.raises(ModelFileError, match=r"nvfp4\.store: .* no checkpoint .* convert .* --weights nvfp4"):
        catalog.ensure_store("tiny", WeightFormat.NVFP4, ignore)
    with pytest.raises(ModelBuildError, match="exists; choose another --name"):
        catalog.convert(source, "tiny", WeightFormat.BF16, ignore)

    catalog.remove("tiny")
    assert catalog.list() == ()
    assert [p.name for p in catalog.models_path.iterdir()] == [".locks"]
    assert source.exists()


def test_removing_a_linked_model_leaves_its_target(catalog: Catalog, source: Path) -> None:
    catalog.models_path.mkdir(parents=True)
    (catalog.models_path / "linked").symlink_to(source)
    assert catalog.path("linked")
    catalog.remove("linked")
    assert catalog.list() == ()
    assert (source / "config.json").exists()


def test_ensure_store_makes_it_once(catalog: Catalog, source: Path) -> None:
    put_checkpoint(catalog, source, "tiny")
    stages: list[str] = []
    for _ in range(2):
        path = catalog.ensure_store("tiny", WeightFormat.BF16, lambda stage, *_: stages.append(stage))
        assert path == catalog.models_path / "tiny" / "stores" / "bf16.store"
    assert stages.count("writing bf16.store") == len(stages) > 0
    num_events = len(stages)
    catalog.ensure_store("tiny", WeightFormat.BF16, lambda stage, *_: stages.append(stage))
    assert len(stages) == num_events
    assert [part.path.name for part in catalog.verify("tiny", ignore)] == ["tiny", "bf16.store"]


def test_a_store_of_an_older_layout_is_made_anew_where_a_checkpoint_allows_it(
    catalog: Catalog, source: Path
) -> None:
    directory = put_checkpoint(catalog, source, "tiny")
    path = catalog.ensure_store("tiny", WeightFormat.BF16, ignore)
    fresh = path.read_bytes()
    path.write_bytes(fresh[:8] + (1).to_bytes(8, "little") + fresh[16:])
    assert not catalog.has_store("tiny", WeightFormat.BF16)
    assert catalog.ensure_store("tiny", WeightFormat.BF16, ignore) == path
    assert path.read_bytes() == fresh

    path.write_bytes(fresh[:8] + (1).to_bytes(8, "little") + fresh[16:])
    for weights in directory.glob("model*.safetensors*"):
        weights.unlink()
    assert catalog.has_store("tiny", WeightFormat.BF16), "its reader says what to do"


def test_two_builders_build_once(catalog: Catalog, source: Path) -> None:
    put_checkpoint(catalog, source, "tiny")
    first_writes, second_waits = threading.Event(), threading.Event()
    stages: list[str] = []

    def first(stage: str, done: int, total: int) -> None:
        first_writes.set()
        assert second_waits.wait(30)

    def second(stage: str, done: int, total: int) -> None:
        stages.append(stage)
        second_waits.set()

    thread = threading.Thread(target=catalog.ensure_store, args=("tiny", WeightFormat.BF16, first))
    thread.start()
    assert first_writes.wait(30)
    path = catalog.ensure_store("tiny", WeightFormat.BF16, second)
    thread.join()
    assert stages == ["waiting for another process that works on tiny"]
    with Store.open(path) as store:
        store.verify(lambda *_: None)


def test_a_killed_builder_frees_the_lock(catalog: Catalog) -> None:
    code = (
        "import sys, time; from pathlib import Path; from localmoe.catalog.building import build_lock\n"
        "with build_lock(Path(sys.argv[1]), print): print('held', flush=True); time.sleep(60)"
    )
    target = catalog.models_path / "tiny"
    with subprocess.Popen([sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        waited: list[str] = []

        def kill_holder(stage: str, done: int, total: int) -> None:
            waited.append(stage)
            os.kill(holder.pid, signal.SIGKILL)

        with build_lock(target, kill_holder):
            assert waited == ["waiting for another process that works on tiny"]


def _no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def _huge_template(path: Path) -> None:
    (path / "chat_template.jinja").unlink()
    with (path / "chat_template.jinja").open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)


def _other_architecture(path: Path) -> None:
    config = json.loads((path / "config.json").read_text()) | {"model_type": "unheard-of"}
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(config))


def _more_layers(path: Path) -> None:
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": 3}
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (_no_tokenizer, r"tokenizer\.json: is missing"),
        (_huge_template, r"chat_template\.jinja: larger than"),
        (_other_architecture, "'unheard-of' is not supported"),
        (_more_layers, "has no tensor model.layers.2"),
    ],
)
def test_bad_sources_leave_nothing(
    damage: Callable[[Path], None], reason: str, catalog: Catalog, source: Path
) -> None:
    damage(source)
    with pytest.raises(CheckpointError, match=reason):
        catalog.convert(source, "tiny", WeightFormat.NVFP4, ignore)
    assert [p.name for p in catalog.models_path.iterdir()] == [".locks"]


def test_verify_finds_damage(catalog: Catalog, source: Path) -> None:
    path = put_checkpoint(catalog, source, "tiny")
    store = catalog.ensure_store("tiny", WeightFormat.NVFP4, ignore)
    whole = store.read_bytes()
    store.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ChecksumError, match=r"nvfp4\.store"):
        catalog.verify("tiny", ignore)
    store.write_bytes(whole)
    _more_layers(path)
    with pytest.raises(CheckpointError, match=r"tensors are missing, among them model\.layers\.2"):
        catalog.verify("tiny", ignore)


def test_configuration_alone_is_listed_but_not_whole(catalog: Catalog) -> None:
    path = catalog.models_path / "bare"
    path.mkdir(parents=True)
    (path / "config.json").write_text("{")
    (entry,) = catalog.list()
    assert (entry.model_type, entry.weights, entry.has_checkpoint) == (None, (), False)
    with pytest.raises(ModelFileError, match="neither a store nor a checkpoint"):
        catalog.verify("bare", ignore)


def test_home_that_cannot_be_written(tmp_path: Path, source: Path) -> None:
    (tmp_path / "home").write_text("a file, not a directory")
    with pytest.raises(ModelBuildError, match="cannot be built or removed"):
        Catalog(tmp_path / "home").convert(source, "tiny", WeightFormat.BF16, ignore)
