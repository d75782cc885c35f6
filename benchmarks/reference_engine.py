"""Speed of the native engine on a served model's store, against the machine's read bandwidth.

    python benchmarks/reference_engine.py [STORE]

Prompts are seeded random token ids, every stream generates greedily, prefix caching is off. Prints a Markdown
table. The roof of decoding is the bandwidth over the bytes a step must read: float32 weights of the experts that
are routed to and of everything dense, each once.
"""

import platform
import sys
import time
from pathlib import Path

import torch

from localmoe.catalog.catalog import DEMO_NAME, Catalog
from localmoe.config.settings import load_settings
from localmoe.core.model import ModelShape, WeightFormat
from localmoe.core.request import Request, SamplingParams
from localmoe.engine.config import EngineConfig
from localmoe.engine.engine import Engine
from localmoe.engine.load import load_engine, warm_up
from localmoe.formats.store import Store
from localmoe.hardware.memory import available_memory_bytes

PREFILL_TOKENS = 512
DECODE_TOKENS = 32


def read_bandwidth_bytes_s() -> float:
    """Best of five sums over 2 GiB."""
    values = torch.ones(1 << 29)
    best_s = min(_timed(lambda: values.sum()) for _ in range(5))
    return values.nbytes / best_s


def measure(engine: Engine, vocab_size: int, num_streams: int, prompt_tokens: int, max_tokens: int) -> float:
    """Seconds until all streams are finished, prefill excluded where tokens are generated."""
    generator = torch.Generator().manual_seed(num_streams)
    for i in range(num_streams):
        prompt_ids = torch.randint(0, vocab_size, (prompt_tokens,), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
        engine.add(Request(id=f"{i}", model="", prompt_ids=prompt_ids, sampling=sampling))
    if max_tokens > 1:
        engine.step()
    return _timed(lambda: _run(engine))


def decode_bytes(shape: ModelShape) -> int:
    """Bytes of one token alone: attention, its experts, and the output head, all float32."""
    attention = 2 * shape.hidden_size * (shape.num_heads + shape.num_kv_heads) * shape.head_dim
    experts = 3 * shape.top_k * shape.hidden_size * shape.expert_size
    return 4 * (shape.num_layers * (attention + experts) + shape.vocab_size * shape.hidden_size)


def main() -> None:
    catalog = Catalog(load_settings().home)
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else catalog.store_path(DEMO_NAME, WeightFormat.NVFP4)
    with Store.open(path) as store:
        shape, weights = store.shape, store.weights
    config = EngineConfig(prefix_caching=False)
    started = time.perf_counter()
    engine = load_engine("benchmark", path, config, available_memory_bytes())
    load_s = time.perf_counter() - started
    warm_up(engine)
    bandwidth = read_bandwidth_bytes_s()
    measure(engine, shape.vocab_size, 1, PREFILL_TOKENS, 1)
    prefill_s = measure(engine, shape.vocab_size, 1, PREFILL_TOKENS, 1)

    print(f"{path.name} of {path.parent.parent.name} ({weights}), {platform.processor() or platform.machine()},")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}, reads {bandwidth / 1e9:.1f} GB/s\n")
    print("| measure | figure |\n|---|---|")
    print(f"| load | {load_s:.1f} s |")
    print(f"| prefill of {PREFILL_TOKENS} | {PREFILL_TOKENS / prefill_s:.0f} tok/s |")
    for num_streams in (1, 8, 32):
        seconds = measure(engine, shape.vocab_size, num_streams, 16, DECODE_TOKENS)
        tok_s = num_streams * (DECODE_TOKENS - 1) / seconds
        roof = f", {tok_s * decode_bytes(shape) / bandwidth:.0%} of the roof" if num_streams == 1 else ""
        print(f"| decode, {num_streams} streams | {tok_s:.1f} tok/s{roof} |")


def _run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def _timed(work: object) -> float:
    assert callable(work)
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
