"""What is wrong, or a pity, about settings that are each allowed: among themselves, for the models, on this machine.

Nothing here stops a server: an engine that cannot start says so when it is loaded, and others serve. What is found is
said before, with what to change.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from localmoe.backends.deepspeed_config import DeepSpeedConfig
from localmoe.backends.remote_config import RemoteConfig
from localmoe.backends.vllm_config import VllmConfig
from localmoe.config.settings import EngineSettings, Settings, engine_settings
from localmoe.core.serving import ADAPTING_ENGINES, ModelSpec
from localmoe.engine.config import EngineConfig
from localmoe.gateway.config import GatewayConfig
from localmoe.gateway.identity.config import is_loopback

_IDLE_RAM_SHARE = 0.25
"""RAM that nobody uses is worth a word from so much on."""


@dataclass(frozen=True, kw_only=True)
class EngineVersion:
    """An engine in an environment of its own."""

    installed: str | None
    """None: it is not."""
    pinned: str
    """What this LocalMoE is tested with."""
    is_current: bool
    """Whether all that is installed with it is as pinned."""
    build: Literal["cpu", "cuda"] | None = None


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What settings are held against."""

    gpu_bytes: Sequence[int | None]
    """Memory of each GPU; None where nobody says."""
    num_cores: int
    ram_bytes: int
    engine_kinds: Collection[str]
    """That there are, those of installed packages included."""
    native_on_gpu: bool
    """Whether what native engines need to compute on a GPU is installed."""
    engines: Mapping[str, EngineVersion]
    context_tokens: Mapping[str, int | None]
    """By model of the catalog: the longest sequence it was made for; None where its files do not say."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that somebody should know."""

    kind: Literal["error", "lacking", "advice", "idle"]
    """`error`: it contradicts itself, anywhere; `lacking`: the machine or a model has not what it takes; `advice`: it
    works, but hardly as meant; `idle`: hardware that no engine uses."""
    model: str | None
    """The served model that it concerns; None: all."""
    message: str
    """What, and what to change."""

    def __str__(self) -> str:
        """On one line."""
        return f"{self.kind}: {f'{self.model}: ' if self.model else ''}{self.message}"


@dataclass(frozen=True, kw_only=True)
class _Engine:
    model: ModelSpec
    kind: str
    config: EngineSettings

    def gpus(self, machine: Machine) -> set[int]:
        """Those that it uses, by number."""
        found = len(machine.gpu_bytes)
        match self.config:
            case EngineConfig(device=device) if device != "cpu" and found and machine.native_on_gpu:
                return {_number(device)}
            case VllmConfig(url=None) as vllm if found and _is_on_gpu(self.kind, machine):
                return {*(vllm.gpu_devices or range(vllm.tensor_parallel_size * vllm.pipeline_parallel_size))}
            case DeepSpeedConfig() as deepspeed if found and _is_on_gpu(self.kind, machine):
                return {*(deepspeed.gpu_devices or range(deepspeed.num_ranks))}
        return set()


def check(settings: Settings, machine: Machine, known_context_tokens: Mapping[str, int]) -> list[Finding]:
    """All findings; errors first.

    Args:
        settings: to be checked.
        machine: to be checked against.
        known_context_tokens: of models that need not be here.
    """
    engines = [
        _Engine(model=model, kind=engine.engine, config=engine_settings(settings, model, engine))
        for model in settings.models
        for engine in model.engines
    ]
    found = [*_check_models(settings), *_check_times(settings), *_check_access(settings)]
    found += _check_shared_gpus(engines, machine)
    found += _check_ram(engines, machine)
    for engine in engines:
        found += _check_context(engine, machine, known_context_tokens)
        found += _check_engine(engine)
        found += _check_hardware(engine, machine)
        found += _check_version(engine, machine)
    for model in settings.models:
        found += _check_presence(model, machine)
    found += _idle(engines, machine)
    order = ("error", "lacking", "advice", "idle")
    return sorted(dict.fromkeys(found), key=lambda finding: order.index(finding.kind))


def _check_models(settings: Settings) -> Iterator[Finding]:
    names = {name for model in settings.models for name in model.names}
    for model in settings.models:
        if model.has_idle_adapters:
            yield _error(
                f"{model.served_name} has adapters, and no engine of kind {' or '.join(ADAPTING_ENGINES)}, which "
                "alone add them; give it one",
                model.served_name,
            )
        for name in model.fallbacks:
            if name in model.names:
                yield _error(
                    f"{model.served_name} falls back on itself; take {name!r} out of its fallbacks",
                    model.served_name,
                )
            elif name not in names:
                yield _advice(
                    f"{model.served_name} falls back on {name!r}, which is not served; add it to models, or take it "
                    "out of fallbacks",
                    model.served_name,
                )


def _check_times(settings: Settings) -> Iterator[Finding]:
    dispatch = settings.dispatch
    if dispatch.stall_timeout_s > dispatch.request_timeout_s:
        yield _advice(
            f"dispatch.stall_timeout_s is {dispatch.stall_timeout_s}, longer than any answer may take "
            f"(dispatch.request_timeout_s, {dispatch.request_timeout_s}); lower it, so that silent engines are left"
        )
    if settings.gateway.keepalive_s > dispatch.request_timeout_s:
        yield _advice(
            f"gateway.keepalive_s is {settings.gateway.keepalive_s}, longer than any answer may take; lower it, so "
            "that proxies keep silent streams open"
        )


def _check_access(settings: Settings) -> Iterator[Finding]:
    """Who may use the server."""
    gateway = settings.gateway
    if gateway.identity.mode != "open":
        return
    if not is_loopback(settings.host):
        yield _advice(
            f"host is {settings.host}, and gateway.identity.mode is open: everybody who can reach it may do "
            "everything; set it to auto, or host to 127.0.0.1"
        )
    if "*" in gateway.cors.origins:
        yield _advice(
            "gateway.cors.origins has * in it, and gateway.identity.mode is open: every page that somebody here "
            "opens may use the server; name the pages"
        )
    if gateway.limits != GatewayConfig().limits:
        yield _advice(
            "gateway.limits count by key or token, and gateway.identity.mode is open, so nothing is counted; set it "
            "to required"
        )


def _check_context(engine: _Engine, machine: Machine, known: Mapping[str, int]) -> Iterator[Finding]:
    """Sequences longer than the model knows."""
    name = engine.model.model
    own_tokens = machine.context_tokens.get(name) or known.get(name)
    match engine.config:
        case VllmConfig(max_model_len=asked):
            setting = "max_model_len"
        case EngineConfig(max_context_tokens=asked) | DeepSpeedConfig(max_context_tokens=asked):
            setting = "max_context_tokens"
        case _:
            return
    if own_tokens is not None and asked is not None and asked > own_tokens:
        yield Finding(
            # vLLM refuses to start so; others take the smaller of the two.
            kind="lacking" if isinstance(engine.config, VllmConfig) else "advice",
            model=engine.model.served_name,
            message=f"{_block(engine)}.{setting} is {asked}, but {name} knows {own_tokens} positions; set it to "
            f"{own_tokens}, or leave it out, which means the same",
        )


def _check_engine(engine: _Engine) -> Iterator[Finding]:
    """Settings of one engine against each other."""
    name, config = engine.model.served_name, engine.config
    match config:
        case VllmConfig():
            tokens, length = config.max_num_batched_tokens, config.max_model_len
            if tokens is not None and length is not None and tokens < length and not config.enable_chunked_prefill:
                yield _error(
                    f"vllm.max_num_batched_tokens is {tokens}, less than max_model_len, {length}, so that longer "
                    "prompts can never be computed; raise it, or set enable_chunked_prefill: true",
                    name,
                )
            if tokens is not None and tokens < config.max_num_seqs:
                yield _error(
                    f"vllm.max_num_batched_tokens is {tokens}, less than max_num_seqs, {config.max_num_seqs}: each "
                    "sequence takes a token; raise the one, or lower the other",
                    name,
                )
        case EngineConfig():
            tiers = config.tiers
            beside_bytes = tiers.reserve_bytes + (config.kv_cache_bytes or 0)
            if tiers.ram_bytes is not None and tiers.ram_bytes <= beside_bytes and config.device == "cpu":
                yield _error(
                    f"engine.tiers.ram_bytes is {tiers.ram_bytes}, and kv_cache_bytes and reserve_bytes alone take "
                    f"{beside_bytes}; raise it, or lower them",
                    name,
                )
            if config.expert_threshold or config.adaptive_expert_threshold:
                yield _advice("engine.expert_threshold is lossy: answers are others than the model's", name)


def _check_hardware(engine: _Engine, machine: Machine) -> Iterator[Finding]:
    """What an engine takes and the machine has not."""
    name, config, there = engine.model.served_name, engine.config, len(machine.gpu_bytes)
    match config:
        case VllmConfig(url=None) if config.distributed_executor_backend != "ray":
            needed = config.tensor_parallel_size * config.pipeline_parallel_size
            if needed > max(1, there):
                yield _lacking(
                    f"vllm.tensor_parallel_size times pipeline_parallel_size is {needed}, and this machine has "
                    f"{_gpus(there)}; set tensor_parallel_size: {max(1, there)}",
                    name,
                )
            yield from _check_devices("vllm.gpu_devices", config.gpu_devices, there, name)
        case DeepSpeedConfig():
            yield from _check_devices("deepspeed.gpu_devices", config.gpu_devices, there, name)
            num_threads = config.num_ranks * (config.num_threads or 1)
            if num_threads > machine.num_cores and not there:
                yield _lacking(
                    f"deepspeed.num_ranks times num_threads is {num_threads}, and this machine has "
                    f"{machine.num_cores} cores; lower one of them",
                    name,
                )
        case EngineConfig():
            yield from _check_native(config, machine, name)


def _check_native(config: EngineConfig, machine: Machine, name: str) -> Iterator[Finding]:
    there, number, vram_bytes = len(machine.gpu_bytes), _number(config.device), config.tiers.vram_bytes
    gpu_bytes = machine.gpu_bytes[number] if number < there else None
    if config.device.startswith("cuda") and number >= there:
        yield _lacking(
            f"engine.device is {config.device}, and this machine has {_gpus(there)}; set device: auto", name
        )
    elif config.device.startswith("cuda") and not machine.native_on_gpu:
        yield _lacking(
            f"engine.device is {config.device}, which takes a build of torch for CUDA, and Triton; install them, or "
            "set device: auto",
            name,
        )
    elif config.device != "cpu" and vram_bytes and gpu_bytes and vram_bytes > gpu_bytes:
        yield _lacking(
            f"engine.tiers.vram_bytes is {vram_bytes}, and GPU {number} has {gpu_bytes}; lower it, or leave it out "
            "to take what is free",
            name,
        )
    if config.num_threads is not None and config.num_threads > machine.num_cores:
        yield _lacking(
            f"engine.num_threads is {config.num_threads}, and this machine has {machine.num_cores} cores; more "
            "threads than that wait for each other: lower it, or leave it out",
            name,
        )


def _check_devices(setting: str, devices: Sequence[int], there: int, name: str) -> Iterator[Finding]:
    missing = [device for device in devices if device >= there]
    if missing:
        numbers = f"0 to {there - 1}" if there > 1 else "0 only" if there else "none"
        yield _lacking(
            f"{setting} is {list(devices)}, and this machine has {_gpus(there)}, numbered {numbers}; name others",
            name,
        )


def _check_ram(engines: Sequence[_Engine], machine: Machine) -> Iterator[Finding]:
    given = [
        config.tiers.ram_bytes or 0
        for config in (engine.config for engine in engines)
        if isinstance(config, EngineConfig)
    ]
    if sum(given) > machine.ram_bytes:
        yield _lacking(
            f"engine.tiers.ram_bytes of all native engines together is {sum(given)}, and this machine has "
            f"{machine.ram_bytes} bytes of RAM; lower it, or leave it out to take what is available"
        )


def _check_shared_gpus(engines: Sequence[_Engine], machine: Machine) -> Iterator[Finding]:
    """GPUs of which engines of vLLM want more than there is."""
    shares: dict[int, float] = {}
    for engine in engines:
        if isinstance(engine.config, VllmConfig):
            for device in engine.gpus(machine):
                shares[device] = shares.get(device, 0) + engine.config.gpu_memory_utilization
    for device, share in sorted(shares.items()):
        if share > 1:
            yield _error(
                f"engines of vLLM want {share:.0%} of GPU {device}'s memory together; give each GPUs of its own with "
                "gpu_devices, or lower gpu_memory_utilization"
            )


def _check_version(engine: _Engine, machine: Machine) -> Iterator[Finding]:
    if isinstance(engine.config, VllmConfig) and engine.config.url is not None:
        return
    name = engine.model.served_name
    if engine.kind not in machine.engine_kinds:
        yield _lacking(f"{engine.kind!r} is no kind of engine; there are {', '.join(machine.engine_kinds)}", name)
    version = machine.engines.get(engine.kind)
    if version is None:
        return
    advice = f"localmoe engines install {engine.kind}"
    if version.installed is None:
        yield _lacking(f"{engine.kind} is not installed; install it with: {advice}", name)
    elif not version.is_current:
        yield _advice(
            f"{engine.kind} {version.installed} is installed, and this LocalMoE is tested with {version.pinned} and "
            f"what goes with it; bring it up to date with: {advice}",
            name,
        )
    elif machine.gpu_bytes and version.build == "cpu":
        yield _advice(f"{engine.kind} is installed for the processor, and this machine has GPUs; {advice}", name)


def _check_presence(model: ModelSpec, machine: Machine) -> Iterator[Finding]:
    if model.model not in machine.context_tokens and any(engine.engine != "remote" for engine in model.engines):
        yield _lacking(
            f"{model.model} is not on this machine; take it in with: localmoe models convert DIRECTORY --name NAME, "
            "and write that name",
            model.served_name,
        )


def _idle(engines: Sequence[_Engine], machine: Machine) -> Iterator[Finding]:
    """Hardware that no engine uses. Nothing is said where no models are named: the demo model needs little."""
    local = [engine for engine in engines if not isinstance(engine.config, RemoteConfig)]
    if not engines:
        return
    used: set[int] = set().union(*(engine.gpus(machine) for engine in engines))
    idle = [device for device in range(len(machine.gpu_bytes)) if device not in used]
    if idle:
        advice = "give a model another engine there (engine.device, gpu_devices), or raise tensor_parallel_size"
        if not machine.native_on_gpu:
            advice = "let vLLM serve a model, or install a build of torch for CUDA, and Triton, for native engines"
        yield _idles(
            f"GPU{'s' if len(idle) > 1 else ''} {', '.join(map(str, idle))} of {len(machine.gpu_bytes)}: no engine "
            f"uses {'them' if len(idle) > 1 else 'it'}; {advice}"
        )
    natives = [engine.config for engine in local if isinstance(engine.config, EngineConfig)]
    if not natives or len(natives) < len(local):
        return  # others take cores and RAM as they need them
    num_threads = [config.num_threads for config in natives]
    if all(num_threads) and (num := sum(filter(None, num_threads))) < machine.num_cores:
        yield _idles(
            f"{machine.num_cores - num} of {machine.num_cores} cores: native engines have {num} threads together; "
            "raise engine.num_threads, or leave it out"
        )
    given = [config.tiers.ram_bytes for config in natives]
    if all(given) and (free := machine.ram_bytes - sum(filter(None, given))) > _IDLE_RAM_SHARE * machine.ram_bytes:
        yield _idles(
            f"{free / 1e9:.0f} of {machine.ram_bytes / 1e9:.0f} GB of RAM: native engines may take "
            f"{sum(filter(None, given)) / 1e9:.0f} GB; raise engine.tiers.ram_bytes, or leave it out"
        )


def _number(device: str) -> int:
    """Of the GPU that a native engine takes first."""
    return int(device.partition(":")[2] or 0)


def _block(engine: _Engine) -> str:
    return "engine" if engine.kind == "native" else engine.kind


def _is_on_gpu(kind: str, machine: Machine) -> bool:
    version = machine.engines.get(kind)
    return version is None or version.build != "cpu"


def _gpus(count: int) -> str:
    return {0: "no GPU", 1: "1 GPU"}.get(count, f"{count} GPUs")


def _error(message: str, model: str | None = None) -> Finding:
    return Finding(kind="error", model=model, message=message)


def _lacking(message: str, model: str | None = None) -> Finding:
    return Finding(kind="lacking", model=model, message=message)


def _advice(message: str, model: str | None = None) -> Finding:
    return Finding(kind="advice", model=model, message=message)


def _idles(message: str) -> Finding:
    return Finding(kind="idle", model=None, message=message)
