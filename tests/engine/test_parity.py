"""The engine against transformers on the same unquantised checkpoint, in float32."""

from dataclasses import replace
from pathlib import Path

import torch

from localmoe.engine.config import EngineConfig
from localmoe.engine.load import load_decoder
from localmoe.formats.store import Store
from support.checkpoints import load_reference
from support.models import FakeExperts, all_models, greedy, kernels_under_test, make_engine, paged_logits, run

NUM_POSITIONS = 512
MAX_LOGIT_ERROR = 1e-3


def random_ids(vocab_size: int, count: int, seed: int) -> list[int]:
    ids: list[int] = torch.randint(0, vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


@all_models
@torch.inference_mode()
def test_logits_and_greedy_tokens_equal_transformers(model_under_test: tuple[Path, Path]) -> None:
    checkpoint, store_path = model_under_test
    with Store.open(store_path) as store:
        decoder = load_decoder(store, kernels_under_test())
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
        decoder = load_decoder(store, kernels_under_test())
    token_ids = random_ids(decoder.shape.vocab_size, 64, seed=1)
    before = paged_logits(decoder, token_ids, 64)
    experts = decoder.experts
    decoder.experts = FakeExperts(
        lambda routed, x: experts(replace(routed, ids_TK=routed.ids_TK ^ (routed.layer == 1)), x)
    )
    assert (paged_logits(decoder, token_ids, 64) - before).abs().max() > 100 * MAX_LOGIT_ERROR
