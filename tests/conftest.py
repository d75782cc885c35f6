"""Models that several tests share, made once a session."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Before anything imports Triton: where there is no GPU its kernels are interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
else:
    # Engines that tests start in processes of their own are the processor's.
    os.environ.setdefault("LOCALMOE_ENGINE__DEVICE", "cpu")

from localmoe.catalog.catalog import DEMO_NAME, Catalog
from localmoe.catalog.demo import build_demo
from localmoe.config.settings import load_settings
from localmoe.core.model import WeightFormat
from localmoe.engine import load
from localmoe.kernels.select import select_device
from support.checkpoints import write_checkpoint

_TINY_MODELS = {"distinct-experts": "mixtral", "dense": "llama", "olmoe": "olmoe", "qwen3_moe": "qwen3_moe"}
"""Name to architecture."""


def _quietly(stage: str, done: int, total: int) -> None:
    """No progress bars in tests."""


@pytest.fixture(scope="session", autouse=True)
def _same_process_everywhere() -> None:
    torch.set_num_threads(2)
    # A run that was started in the background inherits an ignored Ctrl-C, and so would all its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def _automatic_is_the_processor() -> Iterator[None]:
    """Tests are of the same engine wherever they run; those of a GPU name it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "select_device", lambda name: select_device("cpu" if name == "auto" else name))
        yield


@pytest.fixture(scope="session")
def tiny_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `LOCALMOE_HOME` with a model of each architecture, as F32 stores; see `_TINY_MODELS`."""
    home = tmp_path_factory.mktemp("home")
    for name, model_type in _TINY_MODELS.items():
        source = write_checkpoint(home / "checkpoints" / name, model_type)
        Catalog(home).convert(source, name, WeightFormat.F32, _quietly)
    return home


@pytest.fixture(scope="session")
def demo_home() -> Path:
    """The user's own `LOCALMOE_HOME` with the demo model, which is made if it is not there yet."""
    home = load_settings().home
    build_demo(Catalog(home), gguf=None, on_progress=_quietly)
    return home


@pytest.fixture(scope="session")
def model_under_test(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    """(checkpoint directory, F32 store) of the model named by the parameter; see `all_models`."""
    if request.param == DEMO_NAME:
        home = request.getfixturevalue("demo_home")
        return home / "models" / DEMO_NAME, Catalog(home).ensure_store(DEMO_NAME, WeightFormat.F32, _quietly)
    home = request.getfixturevalue("tiny_home")
    return home / "checkpoints" / request.param, Catalog(home).store_path(request.param, WeightFormat.F32)
