"""vLLM's settings and the command line that they become."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from localmoe.backends.vllm_config import FLAGS, RETIRED, LoraModule, VllmConfig, command, environment
from localmoe.core.errors import EngineStartError

DOCS = Path(__file__).parents[3] / "docs/engine-settings.md"
OURS = {"api_key", "url", "gpu_devices", "start_timeout_s", "hang_timeout_s"}
"""Settings that are no flags."""


def words(
    on_gpu: bool = True, adapters: Mapping[str, LoraModule | None] | None = None, **config: Any
) -> list[str]:
    return command(
        VllmConfig(**config),
        python=Path("/env/bin/python"),
        model="m",
        model_path=Path("/models/m"),
        socket=Path("/run/s"),
        on_gpu=on_gpu,
        adapters=adapters or {},
    )


def flag(said: list[str], name: str) -> str:
    return said[said.index(name) + 1]


def test_every_setting_is_a_flag_or_ours() -> None:
    assert {field.name for field in fields(VllmConfig)} == FLAGS.keys() | OURS


def test_the_defaults() -> None:
    said = words()
    assert said[:4] == ["/env/bin/python", "-I", "-m", "vllm.entrypoints.openai.api_server"]
    assert (flag(said, "--model"), flag(said, "--uds")) == ("/models/m", "/run/s")
    assert "--served-model-name=m" in said  # one word, so that no name is ever a flag
    assert flag(said, "--generation-config") == "vllm"
    assert flag(said, "--load-format") == "safetensors"  # never what has to be unpickled
    assert {"--no-trust-remote-code", "--enable-prefix-caching", "--no-enforce-eager"} <= {*said}
    assert not {"--quantization", "--block-size", "--max-model-len", "--kv-cache-memory-bytes"} & {*said}


def test_the_guides_settings() -> None:
    said = words(
        tensor_parallel_size=4,
        gpu_memory_utilization=0.85,
        max_model_len=4096,
        max_num_batched_tokens=16384,
        block_size=32,
        max_num_seqs=256,
        enable_chunked_prefill=True,
        quantization="awq",
        trust_remote_code=True,
        pipeline_parallel_size=2,
        distributed_executor_backend="ray",
    )
    assert flag(said, "--tensor-parallel-size") == "4"
    assert flag(said, "--pipeline-parallel-size") == "2"
    assert flag(said, "--distributed-executor-backend") == "ray"
    assert flag(said, "--gpu-memory-utilization") == "0.85"
    assert (flag(said, "--max-model-len"), flag(said, "--block-size")) == ("4096", "32")
    assert (flag(said, "--max-num-batched-tokens"), flag(said, "--max-num-seqs")) == ("16384", "256")
    assert flag(said, "--quantization") == "awq"
    assert {"--enable-chunked-prefill", "--trust-remote-code"} <= {*said}


def test_on_the_processor_the_cache_has_a_size() -> None:
    assert flag(words(on_gpu=False), "--kv-cache-memory-bytes") == str(2 << 30)
    assert flag(words(on_gpu=False, kv_cache_bytes=1 << 20), "--kv-cache-memory-bytes") == str(1 << 20)


def test_adapters_are_served_beside_the_model() -> None:
    assert not any("lora" in word for word in words())
    some = {f"a={index}": LoraModule(path=Path(f"/a/{index}"), rank=rank) for index, rank in enumerate((4, 24, 8))}
    said = words(adapters=some)
    assert "--enable-lora" in said
    assert flag(said, "--max-lora-rank") == "32"  # vLLM takes some ranks only
    assert (flag(said, "--max-loras"), flag(said, "--max-cpu-loras")) == ("3", "3")
    modules = [json.loads(word) for word in said[said.index("--lora-modules") + 1 :]]
    assert modules == [{"name": f"a={index}", "path": f"/a/{index}"} for index in range(3)]
    on_processor = words(on_gpu=False, adapters=some)  # where the last place must stay empty
    assert (flag(on_processor, "--max-loras"), flag(on_processor, "--max-cpu-loras")) == ("4", "4")
    many = {str(index): LoraModule(path=Path("/a"), rank=1) for index in range(20)}
    assert (flag(words(adapters=many), "--max-loras"), flag(words(adapters=many), "--max-cpu-loras")) == (
        "8",
        "20",
    )


def test_adapters_that_vllm_cannot_serve_are_refused() -> None:
    with pytest.raises(EngineStartError, match="one has rank 513, and vLLM takes 512 at most"):
        words(adapters={"a": LoraModule(path=Path("/a"), rank=513)})
    with pytest.raises(EngineStartError, match="a has no directory, and vLLM is started here"):
        words(adapters={"a": None})


def test_gguf_is_for_gpus() -> None:
    assert flag(words(quantization="gguf"), "--quantization") == "gguf"
    for name in ("quantization", "load_format"):
        with pytest.raises(EngineStartError, match="on a GPU only"):
            words(on_gpu=False, **{name: "gguf"})


def test_the_environment_names_gpus_and_forbids_the_network() -> None:
    said = environment(VllmConfig(gpu_devices=(2, 3), tensor_parallel_size=2), on_gpu=True)
    assert (said["CUDA_VISIBLE_DEVICES"], said["HF_HUB_OFFLINE"]) == ("2,3", "1")
    assert "VLLM_CPU_OMP_THREADS_BIND" not in said
    assert environment(VllmConfig(), on_gpu=False)["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization": "squeezellm"}, "quantization is squeezellm: vLLM has removed it; use awq, gptq or fp8"),
        ({"quantization": "fp3"}, "quantization is 'fp3'; it must be one of awq"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size is 0; it must be positive"),
        ({"hang_timeout_s": float("nan")}, "hang_timeout_s is nan"),
        ({"start_timeout_s": 1e9}, "start_timeout_s is 1000000000.0; it must be at most"),
        ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5; it must be at most 1"),
        ({"gpu_devices": (0, 0)}, r"gpu_devices is \[0, 0\]; it must be different"),
        ({"gpu_devices": (-1,)}, r"gpu_devices is \[-1\]"),
        ({"gpu_devices": (0, 1)}, "tensor_parallel_size times pipeline_parallel_size is 1"),
        ({"url": "ftp://a"}, "url is 'ftp://a'; it must be like http://host:8000"),
        ({"url": "http://"}, "it must be like"),
        ({"url": "http://a:99999"}, "it must be like"),
        ({"url": "http://user:secret@a"}, "url has a user name"),
    ],
)
def test_what_is_not_allowed(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        VllmConfig(**config)
    assert "secret" not in str(caught.value)


def test_the_document_has_every_setting_and_every_retired_key() -> None:
    text = DOCS.read_text()
    for name, said in FLAGS.items():
        assert f"`{name}`" in text
        assert f"`{said}`" in text
    for name in (*OURS, *RETIRED):
        assert f"`{name}`" in text
