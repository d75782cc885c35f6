"""docs/adding-an-engine.md, done as it says."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx2
import pytest

from support.server import check_gone, running_server

PAGE = Path(__file__).parents[2] / "docs/adding-an-engine.md"
FILE = re.compile(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PROMPT = "the quick brown fox"
MODEL = "distinct-experts"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the package, with what the page adds at last."""
    directory = tmp_path_factory.mktemp("package") / "backwards"
    directory.mkdir()
    files = dict(FILE.findall(PAGE.read_text()))
    assert set(files) == {"pyproject.toml", "backwards.py", "backwards_apart.py", "test_backwards.py"}
    (entry,) = re.findall(r"`(backwards-apart = .*)`", PAGE.read_text())
    project = files["pyproject.toml"].replace('make"\n', f'make"\n{entry}\n')
    files["pyproject.toml"] = project.replace('["backwards"]', '["backwards", "backwards_apart"]')
    assert len(tomllib.loads(files["pyproject.toml"])["project"]["entry-points"]["localmoe.engines"]) == 2
    for name, text in files.items():
        (directory / name).write_text(text)
    return directory


@pytest.fixture(scope="module")
def site(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where it is installed, in place of LocalMoE's own environment."""
    site = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(site), str(package)], check=True, capture_output=True, timeout=100)
    return site


def ask(url: str, engine: str, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 100, **fields}
    headers = {"x-localmoe-engine": engine}
    return dict(httpx2.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30).json())


def backwards(url: str) -> str:
    """What the answer must be."""
    tokens = httpx2.post(f"{url}/v1/tokenize", json={"model": MODEL, "prompt": PROMPT}).json()["tokens"]
    back = {"model": MODEL, "tokens": tokens[::-1]}
    return str(httpx2.post(f"{url}/v1/detokenize", json=back).json()["prompt"])


def test_its_own_test_passes(package: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_backwards.py"],
        cwd=package,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "2 passed" in run.stdout


def test_it_serves_alone_and_beside_native(tiny_home: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    with running_server(tiny_home, MODEL, "f32", engines=["backwards"]) as (url, _):
        answer = ask(url, "auto")
        assert answer["choices"][0]["text"] == backwards(url)
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == answer["usage"]["prompt_tokens"]
        refused = ask(url, "auto", logprobs=1)
        assert refused["error"]["code"] == "invalid_value"
        assert "it knows no probabilities" in refused["error"]["message"]
        load = {"model": "dense", "weights": "f32", "engines": ["backwards-apart"]}
        assert httpx2.post(f"{url}/v1/models/load", json=load, timeout=30).status_code == 200
        assert ask(url, "auto", model="dense")["choices"][0]["text"] == backwards(url)
    settings = {"OTHER_ENGINES": '{"backwards": {"tokens_per_s": 1e9}}'}
    kinds = ["native", "backwards"]
    with running_server(tiny_home, MODEL, "f32", engines=kinds, settings=settings) as (url, _):
        texts = {kind: ask(url, kind)["choices"][0]["text"] for kind in kinds}
        assert texts["backwards"] == backwards(url) != texts["native"]
        # Only one of them can do this.
        assert "logprobs" in ask(url, "auto", logprobs=1)["choices"][0]


def test_wrong_settings_are_said(tiny_home: Path, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    command = [sys.executable, "-m", "localmoe", "serve", MODEL, "--engine", "backwards", "--port", "0"]
    for settings, words in (
        ('{"backwards": {"tokens_per_s": -1}}', "tokens_per_s is -1; it must be positive"),
        ('{"backwards": {"speed": 1}}', "unexpected keyword argument 'speed'"),
    ):
        environment = {**os.environ, "LOCALMOE_HOME": str(tiny_home), "LOCALMOE_OTHER_ENGINES": settings}
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
        assert run.returncode == 1
        assert "error: the engine backwards cannot be made of its settings: " in run.stderr
        assert words in run.stderr
        assert "Traceback" not in run.stderr


def children(mark: str) -> list[int]:
    """Processes that run this code, their guards not counted."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if mark.encode() in b" ".join(words) and words[1] == b"-c":
            found.append(int(path.parent.name))
    return found


async def test_one_in_a_process_of_its_own_is_replaced_and_ends_with_the_server(
    tiny_home: Path, site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(site), prepend=os.pathsep)
    prompt = PROMPT * 20
    with running_server(tiny_home, MODEL, "f32", engines=["backwards-apart", "backwards"]) as (url, pid):
        while "error" in (before := ask(url, "backwards", prompt=prompt, max_tokens=500)):
            assert "is starting" in before["error"]["message"]
        (child,) = children("start_unix_server")
        async with httpx2.AsyncClient(timeout=30) as client:
            body = {"model": MODEL, "prompt": prompt, "max_tokens": 500, "temperature": 0}
            headers = {"x-localmoe-engine": "backwards-apart"}
            named = asyncio.create_task(client.post(f"{url}/v1/completions", json=body, headers=headers))
            others = [asyncio.create_task(client.post(f"{url}/v1/completions", json=body)) for _ in range(4)]
            await asyncio.sleep(0.3)  # in the middle of it
            os.kill(child, signal.SIGKILL)
            for response in await asyncio.gather(named, *others):
                assert response.json().get("choices") == before["choices"], response.text
        (another,) = children("start_unix_server")
        assert another != child
        os.kill(pid, signal.SIGKILL)
        check_gone(another)
