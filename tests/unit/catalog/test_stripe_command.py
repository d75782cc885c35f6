"""`localmoe models stripe`, and what becomes of stripes afterwards."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import Result
from typer.testing import CliRunner

from localmoe.catalog.catalog import Catalog
from localmoe.cli.models import app
from localmoe.core.errors import ChecksumError, ModelBuildError
from localmoe.core.model import WeightFormat
from localmoe.formats.store import Store
from localmoe.formats.stripes import Stripe
from support.checkpoints import write_checkpoint


@pytest.fixture
def catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Catalog:
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "home"))
    catalog = Catalog(tmp_path / "home")
    catalog.convert(write_checkpoint(tmp_path / "source", "mixtral"), "tiny", WeightFormat.F32, lambda *_: None)
    return catalog


@pytest.fixture
def disks(tmp_path: Path) -> list[Path]:
    disks = [tmp_path / f"disk{number}" for number in (1, 2)]
    for disk in disks:
        disk.mkdir()
    return disks


def stripe(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["stripe", "tiny", "--weights", "f32", *map(str, arguments)])


def files(disks: list[Path]) -> list[str]:
    return [path.name for disk in disks for path in sorted(disk.iterdir())]


def test_stripes_are_written_replaced_and_removed(catalog: Catalog, disks: list[Path]) -> None:
    size_bytes = catalog.list()[0].size_bytes
    result = stripe("--force", "--to", disks[0], "--to", disks[1])
    assert result.exit_code == 0, result.output
    assert files(disks) == ["tiny.f32.1-of-3.stripe", "tiny.f32.2-of-3.stripe"]
    paths = [disk / name for disk, name in zip(disks, files(disks), strict=True)]
    assert json.dumps(list(map(str, paths))) in result.stdout
    assert result.stderr == "".join(f"writing {path.name}\n" for path in paths)
    assert catalog.stripes("tiny") == tuple(paths)
    with Store.open(catalog.store_path("tiny", WeightFormat.F32)) as store:
        for path in paths:
            Stripe.open(path, store)
    assert catalog.list()[0].size_bytes == size_bytes

    assert stripe("--force", "--to", disks[1]).exit_code == 0
    assert files(disks) == ["tiny.f32.1-of-2.stripe"]
    assert stripe("--force", "--to", disks[1]).exit_code == 0
    assert files(disks) == ["tiny.f32.1-of-2.stripe"]
    (disks[1] / "another.file").touch()

    result = CliRunner().invoke(app, ["rm", "tiny"], input="y\n")
    assert result.exit_code == 0
    assert str(disks[1] / "tiny.f32.1-of-2.stripe") in result.stdout
    assert files(disks) == ["another.file"]
    assert catalog.list() == ()


def test_a_stripe_that_is_gone_is_told(catalog: Catalog, disks: list[Path]) -> None:
    stripe("--force", "--to", disks[0])
    (path,) = catalog.stripes("tiny")
    path.unlink()
    result = CliRunner().invoke(app, ["rm", "tiny", "--yes"])
    assert result.exit_code == 0
    assert f"{path} was not there to be deleted" in result.stdout


def test_places_that_make_no_sense(catalog: Catalog, disks: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    result = stripe("--to", disks[0])
    assert isinstance(result.exception, ModelBuildError)
    assert "is on the same file system as" in str(result.exception)
    assert "--force" in str(result.exception)
    result = stripe("--force", "--to", disks[0] / "missing")
    assert isinstance(result.exception, ModelBuildError)
    assert "missing: is not a directory; mount" in str(result.exception)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=4096))
    result = stripe("--force", "--to", disks[0])
    assert isinstance(result.exception, ModelBuildError)
    assert "0.00 GB are free there" in str(result.exception)
    assert files(disks) == []
    assert stripe().exit_code == 2


def test_a_damaged_store_leaves_nothing_behind(catalog: Catalog, disks: list[Path]) -> None:
    path = catalog.store_path("tiny", WeightFormat.F32)
    with Store.open(path) as store:
        offset = max(entry.offset for entry in store.expert_entries.values())
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 8)
    for to in (["--to", disks[0]], ["--to", disks[0], "--to", disks[1]], ["--to", disks[0]] * 3):
        result = stripe("--force", *to)
        failed = isinstance(result.exception, ChecksumError)
        assert failed or result.exit_code == 0, result.output
        assert not [name for name in files(disks) if name.endswith(".partial")]
        written = {path for disk in disks for path in disk.iterdir()}
        assert written <= set(catalog.stripes("tiny"))  # which the next try, or `rm`, deletes
