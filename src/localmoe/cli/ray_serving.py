"""`localmoe serve --ray`: engines and gateways as a Ray Serve application on a cluster that is running already."""

import contextlib
import logging
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.backends.vllm_config import VllmConfig
from localmoe.catalog.catalog import Catalog
from localmoe.cli.engine_kinds import EngineKinds, EngineOrder, MadeEngine
from localmoe.cli.providing import provide
from localmoe.cli.terminal import say, url_of
from localmoe.config.settings import Settings, with_overrides
from localmoe.core.errors import ConfigError, EngineStartError
from localmoe.core.serving import ModelSpec
from localmoe.engine.config import EngineConfig

if TYPE_CHECKING:
    from localmoe.cli.ray_deployments import EngineOffer

_GUIDE = "see docs/ray.md"
_NAMESPACE = "localmoe"
_PROBE_S = 10.0
_LOOK_S = 0.5
_DRAIN_S = 5.0
"""How long open answers may go on when the application is ended, or a part of it moves."""
_UNBOUNDED = 1_000_000
"""Requests that a deployment may have at once: how many there are, our own dispatch decides."""


def serve_on_ray(settings: Settings, specs: Sequence[ModelSpec], *, host: str, port: int) -> None:
    """Serve on the cluster until a signal says stop; then nothing of ours is left there.

    Args:
        settings: for all nodes.
        specs: what to serve; all that it needs is on every node, or is made here where this is the only one.
        host: that the gateways listen on, on every node that has one.
        port: likewise.

    Raises:
        ModelNotFoundError, ModelBuildError: see `provide`.
        ConfigError: Ray is not installed, or there is no cluster, or it asks for no token, or cannot do what is set.
        EngineStartError: no engine of a model could be started.
    """
    if find_spec("ray") is None:
        raise ConfigError("--ray needs Ray, which is not installed; install it with: pip install 'localmoe[ray]'")
    _check(settings, port)
    catalog = Catalog(settings.home)
    for spec in specs:
        provide(catalog, spec)
    orders = _orders(settings, catalog, specs)
    # Ray takes signals for itself when it connects, so ours come after.
    with _connected(settings.ray.address), _stop_signals() as stopped, _alone(), _serve_started(host, port):
        _run(settings, specs, _offers(settings, orders), stopped, url_of(host, port))


def _check(settings: Settings, port: int) -> None:
    """Raises ConfigError for settings that make no sense on a cluster."""
    if port == 0:
        raise ConfigError("port is 0; on a Ray cluster every node listens on the same port: choose one")
    if settings.dispatch.policy == "resource_aware":
        raise ConfigError(
            "dispatch.policy is resource_aware, which looks at one machine; choose another with --ray"
        )
    if settings.engine.routing_trace is not None:
        raise ConfigError("routing_trace is a file of one engine; serve on one machine to write it, without --ray")


class _Orders(EngineKinds):
    """Takes down what is ordered. What is made is thrown away, but settings that are wrong are found here."""

    def __init__(self, settings: Settings, catalog: Catalog) -> None:
        from localmoe.core.events import EventBus
        from localmoe.hardware.memory import available_memory_bytes

        super().__init__(settings, catalog, num_threads=1, available_memory=available_memory_bytes, bus=EventBus())
        self.taken: list[tuple[str, EngineOrder]] = []

    def make(self, kind: str, order: EngineOrder) -> MadeEngine:
        """See `EngineKinds.make`."""
        made = super().make(kind, order)
        self.taken.append((kind, replace(order, text=None)))
        return made


def _orders(settings: Settings, catalog: Catalog, specs: Sequence[ModelSpec]) -> list[tuple[str, EngineOrder]]:
    """(kind, order) of each engine that is to run in the cluster. Raises as `DeploymentBuilder.make`."""
    from localmoe.cli.answer_cache import NoAnswerCache
    from localmoe.cli.deployments import DeploymentBuilder
    from localmoe.core.events import EventBus
    from localmoe.hardware.meter import HardwareMeter

    orders = _Orders(settings, catalog)
    builder = DeploymentBuilder(
        settings, catalog, kinds=orders, meter=HardwareMeter(), cache=NoAnswerCache(), bus=EventBus()
    )
    for spec in specs:
        builder.make(spec, builder.text_of(spec))
    return [(kind, order) for kind, order in orders.taken if kind != "remote"]


def _offers(settings: Settings, orders: Sequence[tuple[str, EngineOrder]]) -> "list[tuple[EngineOffer, float]]":
    """Each engine with its share of the processors, and the GPUs that it needs."""
    import ray

    from localmoe.cli.ray_deployments import EngineOffer

    processors = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    processors = [count for count in processors if count >= 1]
    if not processors and orders:
        raise ConfigError("no node of the cluster has a processor to give; start nodes with ray start --num-cpus")
    per_node = math.ceil(len(orders) / max(1, len(processors)))
    share = max(1, int(min(processors, default=1)) // max(1, per_node))
    offers = []
    for kind, order in orders:
        num_threads = _num_threads(settings, kind, order) or share
        offer = EngineOffer(
            kind=kind, order=replace(order, num_natives=min(order.num_natives, per_node)), num_threads=num_threads
        )
        offers.append((offer, _num_gpus(settings, kind, order)))
    return offers


def _num_threads(settings: Settings, kind: str, order: EngineOrder) -> int | None:
    """None where nothing is said."""
    if kind == "native":
        return with_overrides(EngineConfig, settings.engine, order.settings, "engine").num_threads
    if kind == "deepspeed":
        config = with_overrides(DeepSpeedConfig, settings.deepspeed, order.settings, "deepspeed")
        return None if config.num_threads is None else config.num_threads * config.num_ranks
    return None


def _num_gpus(settings: Settings, kind: str, order: EngineOrder) -> float:
    """Raises ConfigError where an engine names GPUs, which Ray gives out."""
    from localmoe.backends.environments import EngineEnvironments

    named = f"{order.model}: {order.name} names its GPUs, but Ray gives them out;"
    if kind == "native":
        device = with_overrides(EngineConfig, settings.engine, order.settings, "engine").device
        if ":" in device:
            raise ConfigError(f"{named} set engine.device to cuda")
        return float(device == "cuda")
    if kind not in ("vllm", "deepspeed"):
        return 0.0
    installed = EngineEnvironments(settings.home).installed(kind)
    if installed is None or installed.build != "cuda":
        return 0.0
    if kind == "vllm":
        vllm = with_overrides(VllmConfig, settings.vllm, order.settings, "vllm")
        if vllm.url is not None:
            return 0.0
        num_gpus, devices = vllm.tensor_parallel_size * vllm.pipeline_parallel_size, vllm.gpu_devices
    else:
        deepspeed = with_overrides(DeepSpeedConfig, settings.deepspeed, order.settings, "deepspeed")
        num_gpus, devices = deepspeed.num_ranks, deepspeed.gpu_devices
    if devices:
        raise ConfigError(f"{named} leave {kind}.gpu_devices out")
    return float(num_gpus)


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
    """Raises ConfigError where there is no cluster that asks for a token, and takes ours."""
    os.environ["RAY_AUTH_MODE"] = "token"  # or Ray would not look for ours everywhere; read when it is imported
    import ray
    from ray.exceptions import RayError

    is_known = address != "auto"
    if is_known:
        _check_token(address)  # first, because Ray takes long to find out that it cannot connect
    try:
        ray.init(address=address, namespace=_NAMESPACE, configure_logging=False, log_to_driver=False)
    except (ConnectionError, RuntimeError, RayError) as error:
        where = f"at {address}" if is_known else "on this machine"
        raise ConfigError(
            f"no Ray cluster {where} took us: {str(error).splitlines()[0]}. Start one with deploy/ray/head, and have "
            f"its token in ~/.ray/auth_token, or in the file that RAY_AUTH_TOKEN_PATH names; {_GUIDE}"
        ) from error
    try:
        if not is_known:
            _check_token(ray.get_runtime_context().gcs_address)
        yield
    finally:
        ray.shutdown()


def _check_token(address: str) -> None:
    """Raises ConfigError where the cluster lets in who has no token."""
    import grpc

    with grpc.insecure_channel(address) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            ask(b"", timeout=_PROBE_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return
            raise ConfigError(f"no Ray cluster answers at {address}: {error.details()}; {_GUIDE}") from error
    raise ConfigError(
        f"the Ray cluster at {address} asks for no token, so everyone who can reach it can run programs on it. Start "
        f"it with RAY_AUTH_MODE=token on every node, as deploy/ray/head and deploy/ray/worker do; {_GUIDE}"
    )


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Raises ConfigError where another `localmoe serve --ray` is at work on the cluster.

    An actor that Ray ends when this process ends, however it does, is the sign; the application itself outlives us if
    we are killed, and is taken away by who serves next.
    """
    import ray

    @ray.remote(num_cpus=0)
    class Sign:
        def show(self) -> None:
            pass

    try:
        sign = Sign.options(name="server").remote()  # type: ignore[attr-defined]
        ray.get(sign.show.remote())
    except ValueError as error:
        raise ConfigError("the cluster has a `localmoe serve --ray` already; stop it first") from error
    yield
    ray.kill(sign)


@contextlib.contextmanager
def _serve_started(host: str, port: int) -> Iterator[None]:
    """Serve with proxies where we want them, and none afterwards. Raises ConfigError where others use it."""
    from ray import serve

    from localmoe.cli.ray_deployments import IN_CLUSTER

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    status = serve.status()
    others = ", ".join(name for name in status.applications if name != IN_CLUSTER)
    if others:
        raise ConfigError(f"the cluster's Ray Serve is used by others: {others}; serve on a cluster of your own")
    if status.applications or status.proxies:
        serve.shutdown()  # of somebody who was killed; its address would stay what it was
    try:
        serve.start(
            proxy_location="EveryNode",
            http_options={"host": host, "port": port},
            logging_config={"log_level": "WARNING", "enable_access_log": False},
        )
        yield
    finally:
        serve.shutdown()


def _application(settings: Settings, specs: Sequence[ModelSpec], offers: "list[tuple[EngineOffer, float]]") -> Any:
    import ray
    from ray import serve

    from localmoe.cli.ray_deployments import EngineDeployment, GatewayDeployment

    handles: dict[str, dict[str, Any]] = {spec.served_name: {} for spec in specs}
    for offer, num_gpus in offers:
        deployment = serve.deployment(
            name=re.sub(r"[^A-Za-z0-9_.-]", "_", f"{offer.order.model}.{offer.order.name}"),
            ray_actor_options={"num_cpus": offer.num_threads, "num_gpus": num_gpus},
            max_ongoing_requests=_UNBOUNDED,
            graceful_shutdown_timeout_s=_DRAIN_S,
            graceful_shutdown_wait_loop_s=_LOOK_S,
        )(EngineDeployment)
        handles[offer.order.model][offer.order.name] = deployment.bind(settings, offer)
    num_nodes = sum(node["Alive"] for node in ray.nodes())
    num_gateways = settings.ray.num_gateways or num_nodes
    gateway = serve.deployment(
        name="gateway",
        num_replicas=num_gateways,
        max_replicas_per_node=math.ceil(num_gateways / num_nodes),
        # Beside engines that compute, a gateway has little to do.
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=_UNBOUNDED,
        graceful_shutdown_timeout_s=_DRAIN_S,
        graceful_shutdown_wait_loop_s=_LOOK_S,
    )(serve.ingress()(GatewayDeployment))
    return gateway.bind(settings, list(specs), handles)


def _run(
    settings: Settings,
    specs: Sequence[ModelSpec],
    offers: "list[tuple[EngineOffer, float]]",
    stopped: threading.Event,
    url: str,
) -> None:
    from ray import serve

    from localmoe.cli.ray_deployments import IN_CLUSTER

    target = serve.RunTarget(
        target=_application(settings, specs, offers), name=IN_CLUSTER, route_prefix="/", logging_config=None
    )
    started = time.monotonic()
    serve.run_many([target], wait_for_ingress_deployment_creation=True, wait_for_applications_running=False)
    say(f"localmoe: loading {', '.join(f'{offer.order.model} ({offer.kind})' for offer, _ in offers)}")
    if _wait_ready(stopped, url):
        say(f"localmoe: ready after {time.monotonic() - started:.1f} s; API docs at {url}/docs")
    stopped.wait()


def _wait_ready(stopped: threading.Event, url: str) -> bool:
    """Whether all models were ready before a signal came. Says what is waited for, each thing once.

    Raises:
        EngineStartError: no engine of a model could be started, or no gateway.
    """
    said: set[str] = set()
    while not stopped.is_set():
        has_gateway, waiting = _look()
        lines = [f"listening on {url} of every node that has a gateway"] if has_gateway else []
        lines += [f"waiting for {line}" for line in waiting]
        for line in lines:
            if line not in said:
                said.add(line)
                say(f"localmoe: {line}")
        if has_gateway and not waiting:
            return True
        stopped.wait(_LOOK_S)
    return False


def _look() -> tuple[bool, list[str]]:
    """Whether there is a gateway, and a line for each part that is not ready. Raises as `_wait_ready`."""
    from ray import serve
    from ray.exceptions import RayTaskError

    from localmoe.cli.ray_deployments import IN_CLUSTER

    overview = serve.status().applications[IN_CLUSTER]
    if overview.status == "DEPLOY_FAILED":
        raise EngineStartError(f"Ray could not start it: {_last_line(overview.message)}")
    parts = overview.deployments
    waiting = [f"{name}: {_last_line(part.message)}" for name, part in parts.items() if part.message]
    if "gateway" not in parts or not parts["gateway"].replica_states.get("RUNNING"):
        return False, waiting
    gateway = serve.get_app_handle(IN_CLUSTER)
    try:
        engines = gateway.waiting.remote().result(timeout_s=_PROBE_S)
    except RayTaskError as error:
        raise EngineStartError(str(error.cause)) from error
    except TimeoutError:
        return True, ["gateway: it does not answer"]
    return True, waiting + engines if engines else []


def _last_line(message: str) -> str:
    """Of a traceback, what went wrong."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "it does not say why"


@contextlib.contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Set by SIGINT and SIGTERM. Further ones change nothing: ending takes seconds, and must leave nothing behind."""
    stopped = threading.Event()

    def stop(number: int, frame: object) -> None:
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
