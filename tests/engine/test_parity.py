"""The engine against transformers on the same unquantised checkpoint, in float32."""

from functools import partial
from pathlib import Path

import pytest
import torch

from localmoe.core.plans import SequenceStep
from localmoe.core.request import SamplingParams
from localmoe.engine.config import EngineConfig
from localmoe.engine.kv_cache import KVCache, place
from localmoe.engine.load import load_decoder
from localmoe.formats.store import Store
from localmoe.models.decoder import Decoder
from support.checkpoints import load_reference
from support.models import all_models, greedy, make_engine, run

NUM_POSITIONS = 512
MAX_LOGIT_ERROR = 1e-3


def paged_logits(decoder: Decoder, token_ids: list[int], chunk_tokens: int) -> torch.Tensor:
    """Logits at every position, computed in chunks through the paged cache with scattered blocks."""
    block_tokens = 16
    num_blocks = -(-len(token_ids) // block_tokens)
    cache = KVCache(decoder.shape, num_blocks, block_tokens)
    table = tuple(torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0)).tolist())
    logits = []
    for start in range(0, len(token_ids), chunk_tokens):
        chunk = token_ids[start : start + chunk_tokens]
        step = SequenceStep(
            sequence_id=0,
            token_ids=tuple(chunk),
            start=start,
            block_table=table,
            samples=False,
            sampling=SamplingParams(max_tokens=1),
            seed=0,
            history=(token_ids, []),
            scores_prompt=False,
        )
        positions = torch.arange(start, start + len(chunk))
        attend = partial(cache.attend, place([step], block_tokens))
        logits.append(decoder.logits(decoder.forward(torch.tensor(chunk), positions, attend)))
    return torch.cat(logits)


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


@all_models
@torch.inference_mode()
def test_logits_and_greedy_tokens_equal_transformers(model_under_test: tuple[Path, Path]) -> None:
    checkpoint, store_path = model_under_test
    with Store.open(store_path) as store:
        decoder = load_decoder(store)
    reference = load_reference(checkpoint)
    vocab_size = decoder.shape.vocab_size

    token_ids = random_ids(vocab_size, NUM_POSITIONS, seed=1)
    expected = reference(torch.tensor([token_ids])).logits[0]
    for chunk_tokens in (NUM_POSITIONS, 100):
        error = (paged_logits(decoder, token_ids, chunk_tokens) - expected).abs().max()
        assert error < MAX_LOGIT_ERROR, f"chunks of {chunk_tokens}"

    prompts = {f"p{i}": random_ids(vocab_size, 3 + 17 * i, seed=i) for i in range(8)}
    engine = make_engine(decoder, EngineConfig())
    ours = run(engine, [greedy(name, prompt) for name, prompt in prompts.items()])
    for name, prompt in prompts.items():
        ids = torch.tensor([prompt])
        # The mask is given, or transformers takes tokens that equal the padding id for padding.
        out = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            use_cache=True,
        )
        assert ours[name] == out[0, len(prompt) :].tolist(), name


@torch.inference_mode()
def test_a_wrong_expert_would_show(tiny_home: Path) -> None:
    """The check above can fail: exchanging two experts of one layer moves the logits far beyond its bound."""
    with Store.open(tiny_home / "models/distinct-experts/stores/f32.store") as store:
        decoder = load_decoder(store)
    token_ids = random_ids(decoder.shape.vocab_size, 64, seed=1)
    before = paged_logits(decoder, token_ids, 64)
    experts = decoder.experts
    decoder.experts = lambda layer, x, ids, weights: experts(layer, x, ids ^ (layer == 1), weights)
    assert (paged_logits(decoder, token_ids, 64) - before).abs().max() > 100 * MAX_LOGIT_ERROR


@pytest.mark.parametrize(
    "key",
    [
        "rope_scaling",
        "hidden_act",
        "num_hidden_layers",
        "num_key_value_heads",
        "model_type",
        "tie_word_embeddings",
    ],
)
def test_configurations_that_would_compute_something_else_are_refused(tiny_home: Path, key: str) -> None:
    from localmoe.core.errors import CheckpointError
    from localmoe.models import architecture
    from support.checkpoints import read_config

    config = read_config(tiny_home / "checkpoints/dense")
    config.pop("rope_parameters", None)
    config[key] = {
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
        "hidden_act": "gelu",
        "num_hidden_layers": 1 << 20,
        "num_key_value_heads": 3,
        "model_type": ["llama"],
        "tie_word_embeddings": "no",
    }[key]
    with pytest.raises(CheckpointError, match=r"config\.json: "):
        architecture(config).parse_shape(config)
