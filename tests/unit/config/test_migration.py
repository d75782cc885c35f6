"""The first design documents' configurations load as they are, with a note for each key that is none any more."""

from pathlib import Path

import pytest
import yaml

from localmoe.config.settings import Settings, load_settings
from localmoe.core.errors import ConfigError

EXAMPLES = Path(__file__).parents[3] / "examples/configs"

MAIN = """
model:
  num_experts: 8
  top_k_experts: 2
  hidden_size: 768
  intermediate_size: 3072
  max_sequence_length: 2048
  quantization_type: "fp16"
  enable_compilation: true

vllm:
  model_name: "microsoft/DialoGPT-medium"
  tensor_parallel_size: 4
  gpu_memory_utilization: 0.9
  max_model_len: 2048
  block_size: 16
  swap_space: 4
  max_num_batched_tokens: 8192
  enable_prefix_caching: true
  quantization: null
"""
BLOCKS = {
    "well matched": (
        "vllm: {tensor_parallel_size: 4, gpu_memory_utilization: 0.9, max_num_batched_tokens: 8192, swap_space: 4}",
        ["vllm.swap_space"],
    ),
    "to be adjusted": ("vllm: {model_name: microsoft/DialoGPT-medium, max_model_len: 2048}", ["vllm.model_name"]),
    "large": (
        "vllm:\n  model_name: meta-llama/Llama-2-70b-chat-hf\n  tensor_parallel_size: 4\n"
        "  gpu_memory_utilization: 0.85\n  max_model_len: 4096\n  max_num_batched_tokens: 16384\n  block_size: 32\n"
        "  swap_space: 8\n",
        ["vllm.model_name", "vllm.swap_space"],
    ),
    "middle": (
        "vllm:\n  model_name: mistralai/Mistral-7B-Instruct-v0.2\n  tensor_parallel_size: 2\n"
        "  gpu_memory_utilization: 0.9\n  max_model_len: 8192\n  max_num_batched_tokens: 32768\n",
        ["vllm.model_name"],
    ),
    "two models": (
        "vllm_instances:\n  - model_name: codellama/CodeLlama-13b-Instruct-hf\n    tensor_parallel_size: 2\n"
        "    gpu_devices: [0, 1]\n  - model_name: mistralai/Mistral-7B-Instruct-v0.2\n"
        "    tensor_parallel_size: 2\n    gpu_devices: [2, 3]\n",
        ["vllm_instances"],
    ),
    "local": (
        "vllm: {model_name: ./models/meta-llama/Llama-2-70b-chat-hf, trust_remote_code: false, load_format: auto}",
        ["vllm.model_name"],
    ),
    "memory": (
        "vllm: {gpu_memory_utilization: 0.85, enable_prefix_caching: true, use_v2_block_manager: true}",
        ["vllm.use_v2_block_manager"],
    ),
    "batches": ("vllm: {max_num_batched_tokens: 16384, max_num_seqs: 256, enable_chunked_prefill: true}", []),
    "quantised": ("vllm: {quantization: awq}", []),
    "short of memory": (
        "vllm: {gpu_memory_utilization: 0.7, tensor_parallel_size: 4, swap_space: 8}",
        ["vllm.swap_space"],
    ),
    "slow": (
        "vllm: {enable_prefix_caching: true, use_v2_block_manager: true, enable_chunked_prefill: true, "
        "max_chunked_prefill_tokens: 1024}",
        ["vllm.use_v2_block_manager", "vllm.max_chunked_prefill_tokens"],
    ),
    "low latency": (
        "memory_config: {max_gpu_layers: 2, prefetch_layers: 1, expert_threshold: 0.2, min_batch_size: 1}\n"
        "compute_config: {enable_fusion: true, overlap_io: true, use_cuda_graph: true}",
        [
            *(f"memory_config.{key}" for key in ("max_gpu_layers", "prefetch_layers")),
            *(f"memory_config.{key}" for key in ("expert_threshold", "min_batch_size")),
            *(f"compute_config.{key}" for key in ("enable_fusion", "overlap_io", "use_cuda_graph")),
        ],
    ),
    "high throughput": (
        "memory_config: {max_gpu_layers: 4, prefetch_layers: 2, expert_threshold: 0.1, max_batch_size: 32}\n"
        "compute_config: {enable_fusion: true, overlap_compute: true, use_parallel_compute: true}",
        [
            *(f"memory_config.{key}" for key in ("max_gpu_layers", "prefetch_layers")),
            *(f"memory_config.{key}" for key in ("expert_threshold", "max_batch_size")),
            *(f"compute_config.{key}" for key in ("enable_fusion", "overlap_compute", "use_parallel_compute")),
        ],
    ),
    "balanced": (
        "memory_config: {max_gpu_layers: 3, prefetch_layers: 2, expert_threshold: 0.15, dynamic_batch: true}\n"
        "compute_config: {enable_fusion: true, auto_tune: true, adaptive_schedule: true}",
        [
            *(f"memory_config.{key}" for key in ("max_gpu_layers", "prefetch_layers")),
            *(f"memory_config.{key}" for key in ("expert_threshold", "dynamic_batch")),
            *(f"compute_config.{key}" for key in ("enable_fusion", "auto_tune", "adaptive_schedule")),
        ],
    ),
    "of other pages": (
        "zero_config: {stage: 3}\nexpert_sharding: {enable: true}\ndevice_pairs: [[0, 1]]\n"
        "deepspeed: {offload_optimizer: {device: cpu}, offload_param: cpu, max_batch_size: 32}",
        [
            "deepspeed.offload_optimizer",
            "deepspeed.max_batch_size",
            "zero_config",
            "expert_sharding",
            "device_pairs",
        ],
    ),
}


def load(tmp_path: Path, text: str) -> tuple[Settings, list[str]]:
    """Settings, and the keys of the notes."""
    file = tmp_path / "config.yaml"
    file.write_text(text)
    notes: list[str] = []
    settings = load_settings(config=file, on_note=notes.append)
    assert all(note.startswith(f"{file}: ") for note in notes)
    return settings, [note.removeprefix(f"{file}: ").partition(":")[0] for note in notes]


def test_the_main_file_loads_as_it_is(tmp_path: Path) -> None:
    settings, notes = load(tmp_path, MAIN)
    sizes = ["num_experts", "top_k_experts", "hidden_size", "intermediate_size", "max_sequence_length"]
    sizes += ["quantization_type", "enable_compilation"]
    assert notes == [*(f"model.{name}" for name in sizes), "vllm.model_name", "vllm.swap_space"]
    (model,) = settings.models
    assert (model.model, [engine.engine for engine in model.engines]) == ("microsoft/DialoGPT-medium", ["vllm"])
    vllm = settings.vllm
    assert (vllm.tensor_parallel_size, vllm.max_model_len, vllm.max_num_batched_tokens) == (4, 2048, 8192)


@pytest.mark.parametrize("name", BLOCKS)
def test_every_block_loads_with_a_note_for_each_key(tmp_path: Path, name: str) -> None:
    text, keys = BLOCKS[name]
    _, notes = load(tmp_path, text)
    assert notes == keys


def test_the_example_of_the_documents_is_theirs(tmp_path: Path) -> None:
    text = (EXAMPLES / "design_documents.yaml").read_text()
    assert yaml.safe_load(text) == yaml.safe_load(MAIN)


def test_the_example_with_an_overlay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSEWHERE_KEY", "key")
    settings = load_settings(config=EXAMPLES / "team.yaml", env="production")
    assert [model.served_name for model in settings.models] == ["chat", "elsewhere"]
    assert settings.dispatch.max_queued == 200


def test_what_has_a_successor_is_taken_for_it(tmp_path: Path) -> None:
    settings, _ = load(tmp_path, BLOCKS["slow"][0])
    assert settings.vllm.max_num_batched_tokens == 1024
    settings, _ = load(tmp_path, "vllm: {max_chunked_prefill_tokens: 1024, max_num_batched_tokens: 2048}")
    assert settings.vllm.max_num_batched_tokens == 2048
    settings, _ = load(tmp_path, "vllm_instances: [{model_name: a, max_batch_size: 3, swap_space: 4}]")
    assert settings.models[0].engines[0].settings == {"max_num_seqs": 3}
    settings, notes = load(tmp_path, "models: [{model: a}]\nvllm: {model_name: b}")
    assert ([model.model for model in settings.models], notes) == (["a"], ["vllm.model_name"])


def test_both_engines_models_are_served(tmp_path: Path) -> None:
    settings, _ = load(tmp_path, "vllm: {model_name: a}\ndeepspeed: {model_name: b}")
    assert [(model.model, model.engines[0].engine) for model in settings.models] == [
        ("a", "vllm"),
        ("b", "deepspeed"),
    ]


def test_a_models_one_name_is_taken(tmp_path: Path) -> None:
    settings, notes = load(tmp_path, "models: [{model: a, name: chat}, {model: b, name: null}]")
    assert [model.served_name for model in settings.models] == ["chat", "b"]
    assert notes == ["models.0.name", "models.1.name"]
    with pytest.raises(ConfigError, match=r"'models\.name' is not a setting any more: served_model_name took its"):
        load(tmp_path, "config_version: 2\nmodels: [{model: a, name: chat}]")


def test_a_file_of_today_has_no_older_keys(tmp_path: Path) -> None:
    assert load(tmp_path, "config_version: 2\nport: 1")[0].port == 1
    assert load(tmp_path, "config_version: 1\nvllm: {swap_space: 4}")[1] == ["vllm.swap_space"]
    for text, said in (
        ("vllm: {swap_space: 4}", "'vllm.swap_space' is not a setting any more: vLLM has none since 0.18"),
        ("memory_config: {prefetch_layers: 1}", "'memory_config' is not a setting"),
        ("vllm_instances: []", "'vllm_instances' is not a setting"),
        ("zero_config: {}", "'zero_config' is not a setting any more"),
    ):
        with pytest.raises(ConfigError) as raised:
            load(tmp_path, f"config_version: 2\n{text}")
        assert said in str(raised.value)


@pytest.mark.parametrize(
    ("version", "advice"),
    [("3", "update LocalMoE, or use"), ("0", "write 2"), ("two", "write 2"), ("true", "write 2")],
)
def test_a_version_that_is_not_known_is_refused(tmp_path: Path, version: str, advice: str) -> None:
    with pytest.raises(ConfigError, match=f"this LocalMoE knows 1 to 2; {advice}"):
        load(tmp_path, f"config_version: {version}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: mixtral", "'model' is not a setting any more"),
        ("model: {size: 3}", "model.size was never a setting; name models under `models`"),
        ("vllm_instances: [{gpu_devices: [0]}]", "that each have a model_name"),
        ("vllm_instances: 3", "that each have a model_name"),
        ("vllm: {swap_spaces: 4}", "'vllm.swap_spaces' is not a setting"),
        ("engine: {swap_space: 4}", "'engine.swap_space' is not a setting any more"),
        ("vllm: {quantization: squeezellm}", "vLLM has removed it; use awq, gptq or fp8"),
        ("memory_config: {expert_treshold: 1}", "did you mean 'memory_config.expert_threshold'?"),
    ],
)
def test_what_the_documents_never_had_is_refused(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load(tmp_path, text)
    assert said in str(raised.value)


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_example_loads(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ELSEWHERE_KEY", "key")
    notes: list[str] = []
    load_settings(config=file, on_note=notes.append)
    assert bool(notes) == (file.stem == "design_documents")
