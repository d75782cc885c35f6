"""What `localmoe serve --ray` refuses, without a cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from localmoe.cli import ray_serving
from localmoe.config.settings import Settings
from localmoe.core.errors import ConfigError
from localmoe.dispatch.config import DispatchConfig
from localmoe.engine.config import EngineConfig


@contextmanager
def head(code_name: str | None) -> Iterator[str]:
    """The address of something that answers as a cluster's head does to who has no token."""
    grpc = pytest.importorskip("grpc", reason="gRPC is not installed; it comes with localmoe[ray]")
    from concurrent.futures import ThreadPoolExecutor

    def answer(request: bytes, context: object) -> bytes:
        if code_name is not None:
            context.abort(grpc.StatusCode[code_name], "no token")  # type: ignore[attr-defined]
        return b""

    handler = grpc.method_handlers_generic_handler(
        "ray.rpc.NodeInfoGcsService", {"CheckAlive": grpc.unary_unary_rpc_method_handler(answer)}
    )
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(0).wait()


def test_a_cluster_that_asks_for_a_token_is_taken() -> None:
    with head("UNAUTHENTICATED") as address:
        ray_serving._check_token(address)


def test_a_cluster_that_asks_for_no_token_is_refused_with_what_to_do() -> None:
    with head(None) as address, pytest.raises(ConfigError, match=r"asks for no token.* RAY_AUTH_MODE=token"):
        ray_serving._check_token(address)


def test_where_no_cluster_is_the_message_says_so() -> None:
    with head("UNAVAILABLE") as address, pytest.raises(ConfigError, match="no Ray cluster answers at"):
        ray_serving._check_token(address)


@pytest.mark.parametrize(
    ("change", "port", "message"),
    [
        ({}, 0, "port is 0"),
        (
            {"dispatch": DispatchConfig(policy="resource_aware")},
            8000,
            "resource_aware, which looks at one machine",
        ),
        ({"engine": replace(EngineConfig(), routing_trace="t")}, 8000, "routing_trace is a file of one engine"),
    ],
)
def test_settings_of_one_machine_are_refused(change: dict[str, object], port: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ray_serving._check(Settings(home=Path("/")).model_copy(update=change), port)


def test_without_ray_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_serving, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'localmoe\[ray\]'"):
        ray_serving.serve_on_ray(Settings(home=Path("/")), [], host="127.0.0.1", port=8000)
