"""A small NVFP4 store, written once."""

from pathlib import Path

import pytest
from store_samples import write


@pytest.fixture(scope="session")
def store_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write(tmp_path_factory.mktemp("store") / "m.store").read_bytes()


@pytest.fixture
def store_path(tmp_path: Path, store_bytes: bytes) -> Path:
    """A copy that the test may damage."""
    path = tmp_path / "m.store"
    path.write_bytes(store_bytes)
    return path
