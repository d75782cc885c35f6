"""`localmoe serve --ray` on a cluster of two nodes, both on this machine, with an engine and a gateway on each."""

import asyncio
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx2
import pytest

from localmoe.cli.server_process import ServerProcess
from localmoe.core.errors import EngineStartError
from support.processes import descendants, kill, wait_gone
from support.server import running_server, wait_ready

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed; it comes with localmoe[ray]"),
]

MODEL = "distinct-experts"
DEPLOY = Path(__file__).parents[2] / "deploy" / "ray"
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
PROMPTS = [[5, 17, 3, number] for number in range(4)]
NUM_TOKENS = 900


class Cluster:
    """Two nodes of one processor each, started as docs/ray.md says."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._gcs_port, self.port, self.worker_port = _free_ports(3)
        self.address = f"{HEAD}:{self._gcs_port}"
        self.token = folder / "secrets" / "token"
        self.environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_TOKEN_PATH": str(self.token),
            # Proxies of several nodes cannot listen on one port of one machine.
            "RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(self.worker_port),
        }
        self.environment.pop("RAY_AUTH_MODE", None)
        self._head: subprocess.Popen[bytes] | None = None
        self.worker: subprocess.Popen[bytes] | None = None
        self._seen: set[int] = set()

    def start(self) -> None:
        options = ["--port", str(self._gcs_port), "--num-cpus", "1", "--temp-dir", str(self._folder / "ray")]
        self._head = self._run("head", HEAD, *options)
        while not self.token.exists() or not _listens(HEAD, self._gcs_port):
            assert self._head.poll() is None, (self._folder / "head.log").read_text()
            time.sleep(0.1)
        self.start_worker()
        self._wait_started("head", self._head)

    def start_worker(self) -> None:
        """Unless it runs."""
        if self.worker is None or self.worker.poll() is not None:
            self.worker = self._run("worker", self.address, "--node-ip-address", WORKER, "--num-cpus", "1")
            self._wait_started("worker", self.worker)

    def stop(self) -> None:
        """End both nodes as a person would; nothing that they ever started may be left."""
        for node in (self.worker, self._head):
            if node is not None:
                self._note(node)
                node.send_signal(signal.SIGTERM)
                node.wait(30)
        left = wait_gone(self._seen, 10)
        kill(left)
        assert left == []

    async def kill_worker(self, when: asyncio.Event) -> None:
        """All of its processes but the engine's, which has to notice."""
        assert self.worker is not None
        self._note(self.worker)
        processes = descendants(self.worker.pid)
        engines = [pid for pid, command in processes.items() if "localmoe.engine.process" in command]
        assert len(engines) == 1
        await when.wait()
        kill(pid for pid in processes if pid not in engines)
        self.worker.wait(10)
        assert await asyncio.to_thread(wait_gone, engines, 10) == []

    def _note(self, node: "subprocess.Popen[bytes]") -> None:
        self._seen |= descendants(node.pid).keys()

    def _run(self, script: str, *arguments: str) -> "subprocess.Popen[bytes]":
        with (self._folder / f"{script}.log").open("wb") as log:
            return subprocess.Popen(
                [str(DEPLOY / script), *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _wait_started(self, script: str, node: "subprocess.Popen[bytes]") -> None:
        log = self._folder / f"{script}.log"
        while b"Ray runtime started" not in log.read_bytes():
            assert node.poll() is None, log.read_text()
            time.sleep(0.1)


class Served:
    """Somebody's gateway, and questions to it."""

    def __init__(self, url: str) -> None:
        self.url = url

    @asynccontextmanager
    async def stream(self, prompt_ids: Sequence[int], num_tokens: int = NUM_TOKENS) -> AsyncIterator[Any]:
        """Its events."""
        body = {
            "model": MODEL,
            "prompt": list(prompt_ids),
            "max_tokens": num_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
        async with (
            httpx2.AsyncClient(timeout=60) as client,
            client.stream("POST", f"{self.url}/v1/completions", json=body) as response,
        ):
            assert response.status_code == 200, await response.aread()
            yield _events(response)

    async def text(self, prompt_ids: Sequence[int], on_event: Callable[[], None] = lambda: None) -> str:
        pieces = []
        async with self.stream(prompt_ids) as events:
            async for event in events:
                assert "error" not in event, event
                pieces += [choice["text"] for choice in event["choices"]]
                on_event()
        return "".join(pieces)

    async def texts(self) -> list[str]:
        """Of all prompts at once."""
        return list(await asyncio.gather(*(self.text(prompt) for prompt in PROMPTS)))

    def ask(self, engine: str) -> httpx2.Response:
        body = {"model": MODEL, "prompt": [5], "max_tokens": 4, "temperature": 0}
        headers = {"x-localmoe-engine": engine}
        return httpx2.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=30)

    def computed_tokens(self) -> int:
        """By all engines, prompts included."""
        inspections = httpx2.get(f"{self.url}/v1/experts", timeout=30).json()["data"]
        return sum(sum(one["heat"][0]) // one["top_k"] for one in inspections)

    async def computed_in_the_end(self) -> int:
        """Once it grows no more."""
        last, now = -1, self.computed_tokens()
        while last != now:
            await asyncio.sleep(0.5)
            last, now = now, self.computed_tokens()
        return now

    def metric(self, name: str) -> float:
        lines = httpx2.get(f"{self.url}/metrics").text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name + "{"))


async def _events(response: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    async for line in response.aiter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # Not pytest's folder: names of Unix sockets may be 107 bytes long.
    folder = Path(tempfile.mkdtemp(prefix="localmoe-ray-"))
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder)


@contextmanager
def serving(cluster: Cluster, home: Path, *options: str) -> Iterator[tuple[ServerProcess, str]]:
    command = [sys.executable, "-m", "localmoe", "serve", MODEL, "--weights", "f32", "--ray"]
    settings = {
        "LOCALMOE_HOME": str(home),
        "LOCALMOE_RAY__ADDRESS": cluster.address,
        "LOCALMOE_DISPATCH__POLICY": "round_robin",
        "RAY_AUTH_TOKEN_PATH": str(cluster.token),
    }
    environment = [f"{name}={value}" for name, value in settings.items()]
    engines = ["--engine", "native", "--engine", "native", "--threads", "1"]
    with ServerProcess(
        ["env", *environment, *command, *engines, "--port", str(cluster.port), *options], grace_s=30
    ) as process:
        yield process, process.wait_listening(lambda line: None)


@pytest.fixture(scope="module")
def url(cluster: Cluster, tiny_home: Path) -> Iterator[str]:
    with serving(cluster, tiny_home) as (process, url):
        wait_ready(url, process.check_alive)
        yield url


@pytest.fixture
def served(cluster: Cluster, url: str) -> Served:
    """On the head's gateway, with both nodes and their engines there."""
    cluster.start_worker()
    served = Served(url)
    end_s = time.monotonic() + 60
    while any(served.ask(engine).status_code != 200 for engine in ("native-1", "native-2")):
        assert time.monotonic() < end_s
        time.sleep(0.2)
    return served


@pytest.fixture(scope="module")
def expected(tiny_home: Path) -> list[str]:
    """What a server without Ray answers."""
    with running_server(tiny_home, MODEL, "f32") as (url, _):
        return asyncio.run(Served(url).texts())


async def test_answers_are_a_plain_servers_through_each_gateway(
    cluster: Cluster, served: Served, expected: list[str]
) -> None:
    for port in (cluster.port, cluster.worker_port):
        assert await Served(f"http://127.0.0.1:{port}").texts() == expected


async def test_streams_are_not_held_back(served: Served) -> None:
    begun_s = time.monotonic()
    async with served.stream(PROMPTS[0]) as events:
        times_s = [time.monotonic() - begun_s async for _ in events]
    assert len(times_s) > NUM_TOKENS / 30  # several tokens may come at once, or make one character
    assert times_s[-1] - times_s[0] > 0.05  # held back, they would come in one piece


async def test_a_client_that_leaves_frees_the_engine(served: Served) -> None:
    before = served.computed_tokens()
    async with served.stream(PROMPTS[0], 1000) as events:
        for _ in range(5):
            await anext(events)
    assert 5 <= await served.computed_in_the_end() - before < 900


async def test_a_stop_string_frees_the_engine(served: Served, expected: list[str]) -> None:
    """Here nobody leaves but the gateway, which finds the string."""
    before, stop = served.computed_tokens(), expected[0][20:24]
    body = {"model": MODEL, "prompt": PROMPTS[0], "max_tokens": 1000, "temperature": 0, "stop": stop}
    answer = httpx2.post(f"{served.url}/v1/completions", json=body | {"ignore_eos": True}, timeout=60).json()
    assert answer["choices"][0]["text"] == expected[0].partition(stop)[0]
    assert await served.computed_in_the_end() - before < 900


def test_each_answer_has_one_request_id(served: Served) -> None:
    response = httpx2.get(f"{served.url}/health/live", headers={"x-request-id": "mine"})
    assert response.headers.get_list("x-request-id") == ["mine"]


def test_models_cannot_be_changed(served: Served) -> None:
    response = httpx2.post(f"{served.url}/v1/models/unload", json={"model": MODEL})
    assert response.status_code == 409
    assert "Ray cluster" in response.json()["error"]["message"]


def test_a_second_server_is_refused(cluster: Cluster, served: Served, tiny_home: Path) -> None:
    with (
        pytest.raises(EngineStartError, match="has a `localmoe serve --ray` already"),
        serving(cluster, tiny_home),
    ):
        pass
    assert served.ask("native").status_code == 200


def test_the_cluster_takes_nobody_without_its_token(cluster: Cluster) -> None:
    import grpc

    assert cluster.token.stat().st_mode & 0o777 == 0o600
    token = cluster.token.read_text()
    with grpc.insecure_channel(cluster.address) as channel:
        ask = channel.unary_unary("/ray.rpc.JobInfoGcsService/GetNextJobID")  # a driver's first question
        for bearer in (None, "0" * len(token)):
            with pytest.raises(grpc.RpcError) as caught:
                ask(b"", timeout=10, metadata=[] if bearer is None else [("authorization", f"Bearer {bearer}")])
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert ask(b"", timeout=10, metadata=[("authorization", f"Bearer {token}")])


async def test_answers_go_on_when_a_node_is_killed(cluster: Cluster, served: Served, expected: list[str]) -> None:
    num_events = [0] * len(PROMPTS)
    all_begun = asyncio.Event()

    def count(place: int) -> None:
        num_events[place] += 1
        if min(num_events) >= 20:
            all_begun.set()

    before = served.metric("localmoe_streams_resumed_total")
    answers = [
        asyncio.create_task(served.text(prompt, lambda place=place: count(place)))  # type: ignore[misc]
        for place, prompt in enumerate(PROMPTS)
    ]
    await cluster.kill_worker(all_begun)
    assert await asyncio.gather(*answers) == expected
    # In turn, so half of them were there.
    assert served.metric("localmoe_streams_resumed_total") - before == len(PROMPTS) / 2
    wait_ready(served.url)


def _free_ports(num: int) -> list[int]:
    sockets = [socket.socket() for _ in range(num)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def _listens(host: str, port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((host, port)) == 0
