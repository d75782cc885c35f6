"""What quantisation costs the demo model, on a fixed sample of text and of code."""

import math
from pathlib import Path

import pytest
import torch

from localmoe.catalog.catalog import DEMO_NAME, Catalog
from localmoe.core.model import WeightFormat
from localmoe.engine.load import load_decoder
from localmoe.formats.store import Store
from localmoe.text.text_model import TextModel
from support.models import kernels_under_test, paged_logits

WINDOW_TOKENS = 512
SAMPLES = Path(__file__).parent.parent / "data"
MAX_NVFP4_RATIO = 1.20


@torch.inference_mode()
def perplexity(store_path: Path, token_ids: list[int]) -> float:
    """exp of the mean negative log-likelihood per token, over windows without overlap."""
    with Store.open(store_path) as store:
        decoder = load_decoder(store, kernels_under_test())
    total, count = 0.0, 0
    for window in torch.tensor(token_ids).split(WINDOW_TOKENS):
        logprobs = paged_logits(decoder, window.tolist(), WINDOW_TOKENS)[:-1].log_softmax(-1)
        total -= float(logprobs.gather(1, window[1:, None]).sum())
        count += len(window) - 1
    return math.exp(total / count)


@pytest.mark.slow
def test_plain_rounding_to_nvfp4_costs_little(demo_home: Path) -> None:
    catalog = Catalog(demo_home)
    tokenizer = TextModel.load(catalog.path(DEMO_NAME)).tokenizer
    ratios = {}
    for sample in ("sample_text.txt", "sample_code.txt"):
        token_ids = tokenizer.encode((SAMPLES / sample).read_text(), add_special_tokens=False)[: 4 * WINDOW_TOKENS]
        found = {
            weights: perplexity(catalog.ensure_store(DEMO_NAME, weights, lambda *_: None), token_ids)
            for weights in (WeightFormat.BF16, WeightFormat.NVFP4, WeightFormat.MXFP4)
        }
        ratios[sample] = found[WeightFormat.NVFP4] / found[WeightFormat.BF16]
        print(f"\n{sample}, {len(token_ids)} tokens:", *(f"{w} {p:.3f}" for w, p in found.items()))
    assert max(ratios.values()) <= MAX_NVFP4_RATIO, ratios
