"""The extension module's sources, and the stub that type checkers read in its place."""

import re
from pathlib import Path

import pytest
from nanobind.stubgen import StubGen

ROOT = Path(__file__).parents[2]


def test_every_source_is_compiled() -> None:
    listed = re.findall(r"csrc/\w+\.cpp", (ROOT / "CMakeLists.txt").read_text())
    present = [f"csrc/{path.name}" for path in (ROOT / "csrc").glob("*.cpp")]
    assert sorted(set(listed)) == sorted(present)


def test_stub_is_what_the_extension_says() -> None:
    extension = pytest.importorskip("localmoe._cpu", exc_type=ModuleNotFoundError)
    generator = StubGen(extension)
    generator.put(extension)
    stub = (ROOT / "src/localmoe/_cpu.pyi").read_text()
    assert stub == generator.get(), "run scripts/stub"
