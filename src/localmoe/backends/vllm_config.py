"""Settings of vLLM, and the command line that they become."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal
from urllib.parse import urlsplit

from localmoe.core.errors import EngineStartError

QUANTIZATIONS = (
    *("awq", "gptq", "fp8", "gguf", "compressed-tensors", "mxfp4", "modelopt", "modelopt_fp4", "experts_int8"),
    *("moe_wna16", "torchao", "quark", "inc"),
)
_GONE_QUANTIZATIONS = {
    "squeezellm": "vLLM has removed it; use awq, gptq or fp8",
    "bitsandbytes": "vLLM has removed it; use awq, gptq or fp8",
    "fp16": "it is a type, not a quantisation: write dtype: float16",
}

FLAGS: Mapping[str, str] = MappingProxyType(
    {
        "tensor_parallel_size": "--tensor-parallel-size",
        "pipeline_parallel_size": "--pipeline-parallel-size",
        "distributed_executor_backend": "--distributed-executor-backend",
        "gpu_memory_utilization": "--gpu-memory-utilization",
        "kv_cache_bytes": "--kv-cache-memory-bytes",
        "block_size": "--block-size",
        "max_model_len": "--max-model-len",
        "max_num_seqs": "--max-num-seqs",
        "max_num_batched_tokens": "--max-num-batched-tokens",
        "max_num_queued": "--max-num-queued-reqs",
        "enable_prefix_caching": "--enable-prefix-caching",
        "enable_chunked_prefill": "--enable-chunked-prefill",
        "quantization": "--quantization",
        "load_format": "--load-format",
        "dtype": "--dtype",
        "trust_remote_code": "--trust-remote-code",
        "enforce_eager": "--enforce-eager",
    }
)
"""Settings that are flags of vLLM 0.32; the others are environment variables, or ours."""

RETIRED: Mapping[str, str] = MappingProxyType(
    {
        "model_name": "name the model on the command line: localmoe serve MODEL",
        "swap_space": "vLLM has none since 0.18: a request that is pushed out is computed again. Take max_num_seqs "
        "down, or kv_cache_bytes up, if that happens often",
        "use_v2_block_manager": "it is always on, and vLLM has removed the flag",
        "max_chunked_prefill_tokens": "max_num_batched_tokens took its place: prompts are computed in chunks of at "
        "most that many tokens",
        "max_num_blocks": "the cache is given in bytes, with kv_cache_bytes, or as a share of the GPU, with "
        "gpu_memory_utilization",
        "max_batch_size": "max_num_seqs took its place",
        "max_waiting_time": "continuous batching does not wait; max_num_seqs bounds a step",
    }
)
"""Keys of the first design documents that are no settings, and what became of each."""

_LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM can reserve memory for."""
_MAX_LORAS_IN_STEP = 8
_MAX_TIME_S = 86_400.0

_CPU_KV_CACHE_BYTES = 2 << 30
"""Where nothing is said: by itself vLLM would take nearly all memory, as if it were a GPU's."""


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """How vLLM serves. Names are vLLM's own where it has one; None leaves a value to vLLM."""

    url: str | None = None
    """A vLLM server that runs already, as http://host:8000; None: one is started. The settings below that are
    vLLM's flags are then that server's own business."""
    api_key: str | None = field(default=None, repr=False)
    """What that server asks for, if it asks for a key."""
    tensor_parallel_size: int = 1
    """GPUs that share each layer."""
    pipeline_parallel_size: int = 1
    """Groups of GPUs that have different layers."""
    distributed_executor_backend: Literal["mp", "ray"] | None = None
    """What runs several GPUs: `mp` on this machine, `ray` on those of a Ray cluster; None: `mp`."""
    gpu_devices: tuple[int, ...] = ()
    """GPUs to use, as this machine numbers them; none named: all that there are."""
    gpu_memory_utilization: float = 0.9
    """Share of each GPU's memory that vLLM may take, weights included; above 0, at most 1."""
    kv_cache_bytes: int | None = None
    """Keys and values of all sequences, on each GPU; None: what `gpu_memory_utilization` leaves, on a GPU; 2 GiB on
    the processor."""
    block_size: int | None = None
    """Tokens per cache block."""
    max_model_len: int | None = None
    """Longest sequence, prompt and answer together; None: what the model was made for."""
    max_num_seqs: int = 64
    """Most sequences in one step."""
    max_num_batched_tokens: int | None = None
    """Most tokens in one step; longer prompts are computed in chunks."""
    max_num_queued: int = 1000
    """Requests that may wait in vLLM; more are refused."""
    enable_prefix_caching: bool = True
    """Reuse the keys and values of prompts that begin alike."""
    enable_chunked_prefill: bool = True
    """Compute long prompts in chunks, beside others' answers."""
    quantization: str | None = None
    """How the checkpoint is quantised: one of `QUANTIZATIONS`; None: as the checkpoint says."""
    load_format: Literal["auto", "safetensors", "gguf", "mistral", "dummy"] = "auto"
    """`auto`: safetensors, and nothing else: weights that have to be unpickled are refused. `dummy`: random ones, to
    measure speed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """What to compute in; `auto`: the checkpoint's, but float16 for one in float32."""
    trust_remote_code: bool = False
    """Run Python code that comes with a checkpoint."""
    enforce_eager: bool = False
    """Do not compile the model: vLLM starts in a third of the time, and computes more slowly."""
    start_timeout_s: float = 900.0
    """A server that is not ready this long after its start has failed to start."""
    hang_timeout_s: float = 120.0
    """A server that has requests but sends nothing for this long is taken for hung, and started anew."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int | float) and not isinstance(value, bool) and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.gpu_memory_utilization > 1:
            raise ValueError(f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must be at most 1")
        for name in ("start_timeout_s", "hang_timeout_s"):
            if vars(self)[name] > _MAX_TIME_S:
                raise ValueError(f"{name} is {vars(self)[name]}; it must be at most {_MAX_TIME_S}")
        if self.quantization in _GONE_QUANTIZATIONS:
            raise ValueError(f"quantization is {self.quantization}: {_GONE_QUANTIZATIONS[self.quantization]}")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization is {self.quantization!r}; it must be one of {', '.join(QUANTIZATIONS)}"
            )
        if any(device < 0 for device in self.gpu_devices) or len({*self.gpu_devices}) < len(self.gpu_devices):
            raise ValueError(f"gpu_devices is {list(self.gpu_devices)}; it must be different numbers from 0 on")
        needed = self.tensor_parallel_size * self.pipeline_parallel_size
        if self.gpu_devices and self.distributed_executor_backend != "ray" and len(self.gpu_devices) != needed:
            raise ValueError(
                f"gpu_devices is {list(self.gpu_devices)}, but tensor_parallel_size times pipeline_parallel_size is "
                f"{needed}; it must be as many"
            )
        if self.url is not None:
            _check_url(self.url)
        elif self.api_key is not None:
            raise ValueError("api_key is of no use without url: a server that is started here asks for none")


@dataclass(frozen=True, kw_only=True)
class LoraModule:
    """Low-rank weights in a directory as PEFT writes it."""

    path: Path
    rank: int
    """The largest of its matrices."""


def command(
    config: VllmConfig,
    *,
    python: Path,
    model: str,
    model_path: Path,
    socket: Path,
    on_gpu: bool,
    adapters: Mapping[str, LoraModule | None] = MappingProxyType({}),
) -> list[str]:
    """What starts a server.

    Args:
        python: the interpreter of vLLM's environment.
        model: the name it serves the model under.
        model_path: the checkpoint: a directory, or a GGUF file.
        socket: where it is to listen: a Unix domain socket, which nobody else can reach, in place of a port.
        on_gpu: whether the build is for CUDA.
        adapters: served beside the model, by name; all of them have a directory.

    Raises:
        EngineStartError: that build cannot do it, or an adapter is not here or too large.
    """
    if "gguf" in (config.quantization, config.load_format) and not on_gpu:
        raise EngineStartError("vLLM reads GGUF on a GPU only; on the processor, the native engine does")
    words = [str(python), "-I", "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--uds", str(socket), "--model", str(model_path), f"--served-model-name={model}"]
    # Sampling is all in the request. What vLLM would take from the checkpoint's own defaults is applied before.
    words += ["--generation-config", "vllm"]
    words += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log"]
    # Grammars mean to it what they mean to the native engine: the same library.
    words += ["--structured-outputs-config", '{"backend": "guidance"}']
    for name, flag in FLAGS.items():
        value = vars(config)[name]
        if name == "load_format" and value == "auto":
            value = "safetensors"
        if name == "kv_cache_bytes" and value is None and not on_gpu:
            value = _CPU_KV_CACHE_BYTES
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif value is not None:
            words += [flag, str(value)]
    return words + _adapter_words(adapters, on_gpu=on_gpu)


def _adapter_words(adapters: Mapping[str, LoraModule | None], *, on_gpu: bool) -> list[str]:
    if not adapters:
        return []
    modules = []
    for name, module in adapters.items():
        if module is None:
            raise EngineStartError(f"adapters: {name} has no directory, and vLLM is started here; name one")
        modules.append((name, module))
    needed = max(module.rank for _, module in modules)
    rank = next((rank for rank in _LORA_RANKS if rank >= needed), None)
    if rank is None:
        raise EngineStartError(f"adapters: one has rank {needed}, and vLLM takes {_LORA_RANKS[-1]} at most")
    # Sequences of more adapters than there are places do not share a step. On the processor vLLM 0.32 adds what is in
    # the last place to sequences without an adapter; so there is one more than adapters, which is never taken.
    num_places = min(len(modules), _MAX_LORAS_IN_STEP) if on_gpu else len(modules) + 1
    words = ["--enable-lora", "--max-lora-rank", str(rank), "--max-loras", str(num_places)]
    words += ["--max-cpu-loras", str(max(num_places, len(modules)))]
    # As JSON, so that no name is ever a path or a flag.
    return [*words, "--lora-modules", *(json.dumps({"name": n, "path": str(m.path)}) for n, m in modules)]


def environment(config: VllmConfig, *, on_gpu: bool) -> dict[str, str]:
    """Environment variables of the server, beside ours."""
    variables = {
        # A model is what is in its directory: nothing is fetched, nobody is told.
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
    }
    if not on_gpu:
        # Left to itself it binds its threads to processors, which another engine may have bound its own to, and
        # leaves one unused for itself.
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if config.gpu_devices:
        variables["CUDA_VISIBLE_DEVICES"] = _joined(config.gpu_devices)
        variables["CUDA_DEVICE_ORDER"] = "PCI_BUS_ID"
    return variables


def _joined(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _check_url(url: str) -> None:
    """Raises ValueError unless it is of an HTTP server's root, such as http://10.0.0.7:8000 or https://host/vllm."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        parts, port = None, None
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"url is {url!r}; it must be like http://host:8000")
    if parts.query or parts.fragment or parts.username is not None:
        raise ValueError("url has a user name, a query or a fragment; it must be like http://host:8000")
