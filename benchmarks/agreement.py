"""How many of twenty answers of each engine are those of transformers in float32, token for token.

    python benchmarks/agreement.py [--dtype bf16] [--engines native,vllm,deepspeed]

Serves the demo model (made first if it is not there) with all engines in one type, and asks each and `auto` for 16
greedy tokens to each prompt of tests/data/prompts_parity.json. Two ways to round to bfloat16 differ, so answers may
part at a token that is nearly as likely as another; in float32 all should be equal.
"""

import argparse
import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import aiohttp
import torch
import transformers
from client import BFLOAT16, FLOAT32, SMALL, all_ready, engine_names, serving, session

from localmoe.catalog.catalog import DEMO_NAME, Catalog
from localmoe.catalog.demo import build_demo
from localmoe.config.settings import load_settings
from localmoe.text.text_model import TextModel

NUM_TOKENS = 16
PROMPTS = Path(__file__).parent.parent / "tests/data/prompts_parity.json"


def reference(directory: Path, prompts: Sequence[str]) -> list[list[str]]:
    """Tokens as text, without an end token."""
    text = TextModel.load(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        rendered = text.render_chat([{"role": "user", "content": prompt}])
        ids = torch.tensor([text.tokenizer.encode(rendered, add_special_tokens=False)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0
        )
        new = [token for token in out[0, ids.shape[1] :].tolist() if token not in text.defaults.eos_token_ids]
        answers.append([text.tokenizer.token_text(token) for token in new])
    return answers


async def ask(client: aiohttp.ClientSession, url: str, prompt: str, engine: str) -> list[str]:
    body = {"model": DEMO_NAME, "messages": [{"role": "user", "content": prompt}], "max_tokens": NUM_TOKENS}
    body |= {"temperature": 0, "logprobs": True}
    headers = {"x-localmoe-engine": engine}
    async with client.post(f"{url}/v1/chat/completions", json=body, headers=headers) as response:
        answer = await response.json()
        if response.status != 200:
            raise SystemExit(f"error: {engine}: {answer['error']['message']}")
    choice = answer["choices"][0]
    tokens = [entry["token"] for entry in choice["logprobs"]["content"]]
    return tokens[:-1] if choice["finish_reason"] == "stop" else tokens


async def compare(url: str, names: Sequence[str], prompts: Sequence[str], expected: Sequence[list[str]]) -> None:
    async with session() as client:
        await all_ready(client, url, names)
        print("| engine | equal answers | equal tokens before the first other one |\n|---|---|---|")
        for name in [*names, "auto"]:
            answers = await asyncio.gather(*(ask(client, url, prompt, name) for prompt in prompts))
            same = sum(answer == right for answer, right in zip(answers, expected, strict=True))
            prefix = [
                next((i for i, (a, b) in enumerate(zip(answer, right, strict=False)) if a != b), len(right))
                for answer, right in zip(answers, expected, strict=True)
            ]
            total = sum(map(len, expected))
            print(f"| {name} | {same} of {len(prompts)} | {sum(prefix)} of {total} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "f32"))
    parser.add_argument("--engines", default="native,vllm,deepspeed")
    arguments = parser.parse_args()
    kinds, prompts = arguments.engines.split(","), json.loads(PROMPTS.read_text())
    directory = build_demo(Catalog(load_settings().home), gguf=None, on_progress=lambda *_: None)
    expected = reference(directory, prompts)
    settings = (
        SMALL | (BFLOAT16 if arguments.dtype == "bf16" else FLOAT32) | {"LOCALMOE_VLLM__ENFORCE_EAGER": "true"}
    )
    with serving(kinds, settings, weights=arguments.dtype) as (url, _):
        asyncio.run(compare(url, engine_names(kinds), prompts, expected))


if __name__ == "__main__":
    main()
