"""LocalMoE against llama.cpp where the model does not fit in memory: same shape, threads and limit, in turn.

Each command runs alone in a control group with a memory limit (root is needed), after the model's pages have been
dropped. llama.cpp maps its file; LocalMoE reads experts past the page cache. The disk is measured in the same rounds,
by fio if it is installed. Prints medians and ratios as Markdown, progress on standard error.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from peers.limits import forget_pages, memory_group
from peers.process import OtherWork, PeerError, json_lines, run, say
from peers.systems import LlamaCpp, Setting

from localmoe.bench.machine import cpu_fields, cpu_name
from localmoe.bench.shapes import SHAPES, find_model

PROMPT_TOKENS = 256
DECODE_TOKENS = 24
EPILOG = """examples:
  %(prog)s --workdir ~/peers
  LOCALMOE_ENGINE__TIERS__POLICY=lru %(prog)s --workdir ~/peers --limits-mib 2048 --rounds 1
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if something could not be measured."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir", type=Path, required=True, help="environments, weights and logs, kept for later"
    )
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--limits-mib", default="2048,3072", help="memory of each command (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write every figure")
    args = parser.parse_args(argv)
    setting = Setting(
        workdir=args.workdir.resolve(),
        shape_name=args.shape,
        shape=find_model(args.shape).shape,
        threads=args.threads,
        cpu_flags=frozenset(cpu_fields()["flags"].split()),
    )
    limits = [int(limit) for limit in args.limits_mib.split(",")]
    try:
        rounds = _measure(setting, limits, args.rounds)
    except PeerError as error:
        say(str(error))
        return 1
    if args.json:
        args.json.write_text(json.dumps(rounds, indent=1) + "\n")
    print(
        f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {args.threads} threads, {args.shape}, MXFP4, prompt of "
        f"{PROMPT_TOKENS} tokens, medians of {args.rounds} rounds.\n"
    )
    print(_markdown(rounds))
    return 0


def _measure(setting: Setting, limits_mib: Sequence[int], num_rounds: int) -> dict[str, list[dict[str, float]]]:
    """Figures by limit, one set a round. Raises PeerError."""
    llama = LlamaCpp(setting, "mxfp4")
    llama.prepare()
    gguf = setting.gguf("mxfp4")
    home = {"LOCALMOE_HOME": str(setting.workdir / "home")}
    ours = [sys.executable, "-m", "localmoe", "bench", "tiers", "--json", "--shape", gguf, "--gpu-bytes", "0"]
    ours += ["--threads", str(setting.threads), "--prompt-tokens", str(PROMPT_TOKENS)]
    say("writing our store, outside every limit")
    run([*ours, "--ram-bytes", "2e9"], setting.log("tiers"), variables=home)
    store = setting.workdir / "home" / "bench" / f"{gguf.name}-mxfp4.store"
    rounds: dict[str, list[dict[str, float]]] = {str(limit): [] for limit in limits_mib}
    for number in range(num_rounds):
        for limit in limits_mib:
            other = OtherWork()
            figures: dict[str, float] = {}
            say(f"round {number + 1}, {limit} MiB: llama.cpp")
            with memory_group(limit << 20) as inside:
                forget_pages(gguf)
                figures |= {f"llama_{name}": value for name, value in _llama(llama, gguf, setting, inside).items()}
            say(f"round {number + 1}, {limit} MiB: LocalMoE")
            with memory_group(limit << 20) as inside:
                forget_pages(store)
                (report,) = json_lines(run([*inside, *ours], setting.log(f"tiers-{limit}"), variables=home))
            figures |= {name: value for name, value in report.items() if isinstance(value, int | float)}
            figures |= _fio(store, setting)
            figures["other_cores"] = other.cores()
            rounds[str(limit)].append(figures)
            say(", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    return rounds


def _llama(llama: LlamaCpp, gguf: Path, setting: Setting, inside: Sequence[str]) -> dict[str, float]:
    command = [
        *inside,
        llama.binaries() / "llama-bench",
        "-m",
        gguf,
        "-t",
        str(setting.threads),
        "-o",
        "jsonl",
        "-r",
        "1",
    ]
    # Without its repacked copy, which would not fit beside the file.
    command += ["-p", str(PROMPT_TOKENS), "-n", str(DECODE_TOKENS), "--repack", "0", "--load-mode", "mmap"]
    found = json_lines(run(command, setting.log("llama-limited")))
    return {"prefill_tok_s" if row["n_prompt"] else "decode_tok_s": float(row["avg_ts"]) for row in found}


def _fio(path: Path, setting: Setting) -> Mapping[str, float]:
    """Random direct reads of one expert's size by fio, if it is here."""
    if shutil.which("fio") is None:
        return {}
    command = [
        "fio",
        "--name=read",
        f"--filename={path}",
        "--rw=randread",
        "--bs=3264k",
        "--direct=1",
        "--readonly",
    ]
    command += ["--ioengine=io_uring", "--iodepth=8", "--runtime=3", "--time_based", "--output-format=json"]
    text = run(command, setting.log("fio"))
    read = json.loads(text[text.index("{") :])["jobs"][0]["read"]
    return {"fio_gb_s": read["bw_bytes"] / 1e9}


def _markdown(rounds: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    lines = [
        "| limit | decode, tok/s | llama.cpp | ratio | prefill, tok/s | llama.cpp | ratio | of the limit "
        "| experts in memory | disk, GB/s | fio |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for limit, figures in rounds.items():
        median = {name: statistics.median(f[name] for f in figures if name in f) for name in figures[0]}
        decode, prefill = (
            statistics.median(f[name] / f[f"llama_{name}"] for f in figures)
            for name in ("decode_tok_s", "prefill_tok_s")
        )
        lines.append(
            f"| {limit} MiB | {median['decode_tok_s']:.2f} | {median['llama_decode_tok_s']:.2f} | **{decode:.1f} x** "
            f"| {median['prefill_tok_s']:.0f} | {median['llama_prefill_tok_s']:.0f} | **{prefill:.1f} x** "
            f"| {median['limit_fraction']:.0%} | {median['num_slots']:.0f} of {median['num_experts']:.0f} "
            f"| {median['disk_gb_s']:.2f} | {median.get('fio_gb_s', float('nan')):.2f} |"
        )
    busy = max(f["other_cores"] for figures in rounds.values() for f in figures)
    if busy > 0.1:
        lines.append(f"\nNot valid, the machine was not quiet: other programs used up to {busy:.1f} cores.")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
