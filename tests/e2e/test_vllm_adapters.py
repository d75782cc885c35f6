"""An adapter in the real vLLM on this machine's processor: the same tokens as transformers with it merged in."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from localmoe.backends.vllm import ServedModel, VllmBackend
from localmoe.backends.vllm_config import VllmConfig
from localmoe.cli.spec_checks import lora_modules
from localmoe.core.errors import EngineStartError
from localmoe.core.events import EventBus
from localmoe.core.request import Request, SamplingParams
from localmoe.core.serving import EngineSpec, ModelSpec
from localmoe.text.grammar_source import written
from support.checkpoints import greedy_reference, load_reference, write_checkpoint
from support.engine_environments import with_engines

pytestmark = pytest.mark.slow

NUM_TOKENS = 12
PROMPTS = tuple([3 + (7 * i + 31 * j) % 300 for j in range(5 + 4 * i)] for i in range(3))
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA = 4, 8
"""vLLM reserves memory for rank 8."""


def write_adapter(directory: Path, model_path: Path, *, seed: int) -> tuple[Path, Path]:
    """An adapter of all attention projections as PEFT writes it, and a checkpoint with it merged in, in float32."""
    generator = torch.Generator().manual_seed(seed)
    model: Any = load_reference(model_path)
    weights = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TARGETS:
            num_out, num_in = module.weight.shape
            a_RI = 0.3 * torch.randn(RANK, num_in, generator=generator)
            b_OR = 0.3 * torch.randn(num_out, RANK, generator=generator)
            weights[f"base_model.model.{name}.lora_A.weight"] = a_RI
            weights[f"base_model.model.{name}.lora_B.weight"] = b_OR
            module.weight.data += ALPHA / RANK * b_OR @ a_RI
    adapter, merged = directory / "adapter", directory / "merged"
    adapter.mkdir(parents=True)
    save_file(weights, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "target_modules": list(TARGETS)}))
    model.save_pretrained(merged)
    return adapter, merged


def make_backend(path: Path, adapters: dict[str, str | None]) -> VllmBackend:
    environments = with_engines("vllm")
    spec = ModelSpec(model="m", adapters=adapters, engines=(EngineSpec(engine="vllm"),))
    return VllmBackend(
        model=ServedModel(name="m", vocab_size=306, adapters=lora_modules(spec)),
        model_path=path,
        config=VllmConfig(
            dtype="float32",
            enforce_eager=True,
            max_num_seqs=8,
            kv_cache_bytes=1 << 28,
            max_model_len=1024,
            start_timeout_s=300.0,
        ),
        python=environments.python("vllm"),
        on_gpu=False,
        write_grammar=written,
        bus=EventBus(),
    )


async def answer(
    backend: VllmBackend, prompt_ids: list[int], adapter: str | None, resumed: list[int]
) -> list[int]:
    asked = Request(
        id="a",
        model="m",
        prompt_ids=prompt_ids,
        sampling=SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0),
        adapter=adapter,
        resumed_ids=resumed,
    )
    async with asyncio.timeout(120):
        return [token async for chunk in backend.generate(asked) for token in chunk.token_ids]


async def test_adapters_answer_as_merged_models(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", "llama", head_dim=32)
    made = {f"l{seed}": write_adapter(tmp_path / f"l{seed}", path, seed=seed) for seed in (1, 2)}
    expected = {name: greedy_reference(merged, PROMPTS, NUM_TOKENS) for name, (_, merged) in made.items()}
    plain = greedy_reference(path, PROMPTS, NUM_TOKENS)
    backend = make_backend(path, {name: str(adapter) for name, (adapter, _) in made.items()})
    await backend.start()
    try:
        # Together in one batch, so that each sequence must find its own weights.
        asked = [(ids, name) for name in (None, *made) for ids in PROMPTS]
        found = await asyncio.gather(*(answer(backend, ids, name, []) for ids, name in asked))
        assert found == [*plain, *expected["l1"], *expected["l2"]]
        assert plain != expected["l1"] != expected["l2"]
        # An answer that another engine began goes on with the adapter.
        begun = expected["l1"][0][:5]
        assert await answer(backend, PROMPTS[0], "l1", begun) == expected["l1"][0][5:]
    finally:
        await backend.stop()


async def test_an_adapter_of_another_model_stops_the_start(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "m", "llama", head_dim=32)
    other = write_checkpoint(tmp_path / "other", "llama", head_dim=64)
    adapter, _ = write_adapter(tmp_path / "l", other, seed=1)
    with pytest.raises(EngineStartError):
        await make_backend(path, {"l": str(adapter)}).start()
