"""Speed of vLLM on a model directory with random BF16 weights; runs in vLLM's environment, prints JSON.

vLLM decodes its own output, so its experts repeat more than on other text, which favours it if anything.
"""

import argparse
import json
import statistics
import time

from vllm import LLM, SamplingParams  # type: ignore[import-not-found]


def seconds(model: LLM, num_streams: int, prompt_tokens: int, new_tokens: int, vocab_size: int) -> float:
    """Time to answer so many prompts, each of different tokens, at once."""
    prompts = [
        {"prompt_token_ids": [(7919 * (stream + 1) * (i + 1)) % vocab_size for i in range(prompt_tokens)]}
        for stream in range(num_streams)
    ]
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
    started_s = time.perf_counter()
    answers = model.generate(prompts, sampling, use_tqdm=False)
    elapsed_s = time.perf_counter() - started_s
    assert all(len(answer.outputs[0].token_ids) == new_tokens for answer in answers)
    return elapsed_s


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    for name in ("prompt-tokens", "decode-tokens", "vocab-size"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--streams", type=int, nargs="+", required=True)
    args = parser.parse_args()
    model = LLM(
        args.model,
        load_format="dummy",
        dtype="bfloat16",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=2 * args.prompt_tokens,
        max_num_batched_tokens=2 * args.prompt_tokens,
        max_num_seqs=max(args.streams),
    )
    seconds(model, 1, args.prompt_tokens, 2, args.vocab_size)
    prefills_s = [seconds(model, 1, args.prompt_tokens, 1, args.vocab_size) for _ in range(3)]
    result = {"prefill_tok_s": args.prompt_tokens / statistics.median(prefills_s)}
    for streams in args.streams:
        first_s = seconds(model, streams, 1, 1, args.vocab_size)
        decode_s = seconds(model, streams, 1, 1 + args.decode_tokens, args.vocab_size) - first_s
        result[f"aggregate_{streams}_tok_s"] = streams * args.decode_tokens / decode_s
    print(json.dumps(result))


if __name__ == "__main__":
    main()
