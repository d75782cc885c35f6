"""What went wrong in other servers, as tests of what is in our code and what is not."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import save_file

import localmoe
from localmoe.formats.checkpoint import Checkpoint

Node = TypeVar("Node", bound=ast.AST)


def nodes(kind: type[Node]) -> Iterator[tuple[Path, Node]]:
    """All of a kind in our own code."""
    for path in Path(localmoe.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, kind):
                yield path, node


class TestCommands:
    """LiteLLM CVE-2026-42271: a field that an admin may set became a command line."""

    def test_no_command_of_ours_goes_through_a_shell(self) -> None:
        for path, call in nodes(ast.Call):
            names = {keyword.arg for keyword in call.keywords if ast.unparse(keyword.value) == "True"}
            called = ast.unparse(call.func)
            assert "shell" not in names, f"{path}: {called}"
            assert called not in ("os.system", "os.popen", "asyncio.create_subprocess_shell"), path


class TestDeserialisation:
    """vLLM CVE-2025-62164, diskcache CVE-2025-69872: what came from outside, or lay on disk, was unpickled."""

    PICKLERS = frozenset({"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"})

    def test_nothing_is(self) -> None:
        for path, call in nodes(ast.Call):
            called = ast.unparse(call.func)
            assert called not in ("torch.load", "yaml.unsafe_load", "eval", "exec", "np.load", "numpy.load"), path
        for path, imported in nodes(ast.Import):
            assert not {one.name.partition(".")[0] for one in imported.names} & self.PICKLERS, path
        for path, taken in nodes(ast.ImportFrom):
            assert (taken.module or "").partition(".")[0] not in self.PICKLERS, path
            assert taken.module not in ("torch", "numpy") or "load" not in {one.name for one in taken.names}, path


class TestCodeOfCheckpoints:
    """vLLM CVE-2026-22807: code that a checkpoint's `auto_map` names was run unasked."""

    def test_transformers_is_told_not_to(self) -> None:
        told = [
            (path, ast.unparse(keyword.value))
            for path, call in nodes(ast.Call)
            for keyword in call.keywords
            if keyword.arg == "trust_remote_code"
        ]
        assert len(told) >= 2
        assert {value for _, value in told} == {"False"}, told
        for path, call in nodes(ast.Call):
            if ast.unparse(call.func).endswith(".from_pretrained"):
                assert "trust_remote_code" in {keyword.arg for keyword in call.keywords}, path

    def test_our_own_reader_does_not_look_at_it(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(
            '{"model_type": "llama", "auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.Config"}}'
        )
        (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')")
        save_file({"a": torch.ones(4)}, tmp_path / "model.safetensors")
        assert Checkpoint.open(tmp_path).names == {"a"}
        assert not (tmp_path / "was_run").exists()


class TestDocument:
    """docs/security.md names a test for each of these cases."""

    ROW = re.compile(r"\| (?P<cases>.+?) \| .+? \| (?P<tests>.+?) \|")
    NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
    CASES = frozenset(
        [
            "CVE-2026-48746",
            "CVE-2026-48710",
            "CVE-2026-42208",
            "CVE-2026-42271",
            "CVE-2026-35030",
            "CVE-2025-59425",
            "CVE-2026-34756",
            "CVE-2025-62426",
            "CVE-2025-48944",
            "CVE-2025-62164",
            "CVE-2026-24779",
            "CVE-2026-22807",
            "CVE-2026-7482",
            "CVE-2026-21869",
            "CVE-2026-27482",
            "CVE-2025-69872",
        ]
    )

    def test_there_is_one_for_each(self) -> None:
        root = Path(__file__).parents[2]
        lines = (root / "docs" / "security.md").read_text().splitlines()
        start = lines.index("|---|---|---|", lines.index("| case | here | tests |"))
        table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start + 1 :]))
        rows = [row for line in table if (row := self.ROW.fullmatch(line)) is not None]
        assert len(rows) == len(table)
        assert {case for row in rows for case in re.findall(r"CVE-\d+-\d+", row["cases"])} >= self.CASES
        for row in rows:
            named = self.NAMED.findall(row["tests"])
            assert named, row[0]
            for file, name in named:
                defined = ast.parse((root / file).read_text()).body
                there = {getattr(one, "name", "") for one in defined}
                assert name in there, f"{file} has no {name}"
                assert name.startswith(("test_", "Test")), name
