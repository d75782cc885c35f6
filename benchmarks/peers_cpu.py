"""LocalMoE against other engines on this machine's processor: same shape, same threads, interleaved rounds.

Installs each peer into an environment of its own below the working directory (llama.cpp is compiled, about 15 minutes
on two cores), writes files of random weights, then measures all systems in turn, several rounds. Prints medians and
ratios as Markdown, progress on standard error. Random weights are right for speed and say nothing about quality.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from msgspec.structs import replace
from peers.bench_gguf import EXPERT_FORMATS
from peers.process import OtherWork, PeerError, say
from peers.report import OTHER_CORES, Ratio, Rounds, best_of, disturbed, markdown, medians, ratios
from peers.systems import PREFILL_TOKENS, VLLM, KtKernel, LlamaCpp, LocalMoE, LocalMoELayers, Setting, System

from localmoe.bench.machine import cpu_fields, cpu_name
from localmoe.bench.shapes import SHAPES, find_model

EPILOG = """examples:
  %(prog)s --workdir ~/peers                              llama.cpp, olmoe-1b-7b, three rounds
  %(prog)s --workdir ~/peers --peers llama,vllm,kt        every peer; vLLM takes 15 GB of memory
  %(prog)s --workdir ~/peers --shape qwen3-30b-a3b --formats mxfp4 --rounds 2
  %(prog)s --workdir ~/peers --layers 2 --rounds 1        whether everything works, in a few minutes
"""
PEERS = ("llama", "vllm", "kt")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 1 if something could not be measured."""
    args = _parse(argv)
    shape = find_model(args.shape).shape
    setting = Setting(
        workdir=args.workdir.resolve(),
        shape_name=args.shape,
        shape=replace(shape, num_layers=args.layers or shape.num_layers),
        threads=args.threads,
        cpu_flags=frozenset(cpu_fields()["flags"].split()),
    )
    ours, peers = _systems(setting, args.peers, args.formats)
    failures: dict[str, str] = {}
    systems = _prepared([*ours, *peers], failures)
    rounds = _measured(systems, args.rounds, failures)
    our_names = [system.name for system in ours if system.name in rounds]
    found = ratios(rounds, our_names, [system.name for system in peers])
    best = [
        best_of(rounds, [s.name for s in peers if isinstance(s, kind)], measure)
        for kind, measure in ((LlamaCpp, "decode_tok_s"), (KtKernel, "moe_1_tok_s"))
    ]
    heading = (
        f"{time.strftime('%Y-%m-%d')}, {cpu_name()}, {args.threads} of {os.cpu_count()} threads, "
        f"{args.shape} with {setting.shape.num_layers} layers, prefill of {PREFILL_TOKENS} tokens, "
        f"medians of {args.rounds} interleaved rounds, tokens a second"
    )
    versions = {system.name: system.version for system in systems}
    if args.json:
        document = _document(heading, versions, rounds, found, failures)
        args.json.write_text(json.dumps(document, indent=1) + "\n")
        say(f"wrote {args.json}")
    print(f"{heading}.\n{'; '.join(f'{name}: {version}' for name, version in versions.items())}.\n")
    print(markdown(rounds, found, {system.name: system.weights for system in systems}))
    for name in filter(None, best):
        print(f"\nThe fastest of its kind for one token: {name}.")
    for name, cores in disturbed(rounds).items():
        print(
            f"\nNot valid, the machine was not quiet: other programs used up to {cores:.1f} cores during {name}."
        )
    for name, reason in failures.items():
        print(f"\nNot measured: {name}: {reason}")
    return 1 if failures else 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--workdir", type=Path, required=True, help="environments, weights and logs, kept for later"
    )
    parser.add_argument(
        "--peers", type=_names(PEERS), default=("llama",), help="of llama,vllm,kt (default: llama)"
    )
    parser.add_argument(
        "--formats",
        type=_names(tuple(EXPERT_FORMATS)),
        default=tuple(EXPERT_FORMATS),
        help=f"of llama.cpp's experts: {','.join(EXPERT_FORMATS)}; the best depends on the machine (default: all)",
    )
    parser.add_argument("--shape", choices=SHAPES, default="olmoe-1b-7b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has, for a quick look")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: every core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write every figure")
    return parser.parse_args(argv)


def _names(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of names with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(name.strip() for name in text.split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


def _systems(setting: Setting, peers: Sequence[str], formats: Sequence[str]) -> tuple[list[System], list[System]]:
    """Ours and theirs, in the order of a round."""
    amx = "amx_tile" in setting.cpu_flags
    ours: list[System] = [LocalMoE(setting)]
    if amx:
        ours.append(LocalMoE(setting, "avx512_vnni"))
    theirs: list[System] = []
    if "llama" in peers:
        theirs += [LlamaCpp(setting, name) for name in formats]
    if "vllm" in peers:
        theirs.append(VLLM(setting))
    if "kt" in peers:
        # Its workers spin beside the caller, so that fewer of them can be faster for one token.
        theirs += [KtKernel(setting, "fp4", n, (1,)) for n in sorted({1, setting.threads})]
        theirs.append(KtKernel(setting, "int4", setting.threads, (PREFILL_TOKENS,)))
        ours.append(LocalMoELayers(setting))
    return ours, theirs


def _prepared(systems: Sequence[System], failures: dict[str, str]) -> list[System]:
    """Those that could be installed; reasons for the others go to `failures`."""
    ready = []
    for system in systems:
        say(f"preparing {system.name}")
        try:
            system.prepare()
        except PeerError as error:
            say(f"{system.name}: {error}")
            failures[system.name] = str(error)
        else:
            ready.append(system)
    return ready


def _measured(
    systems: Sequence[System], num_rounds: int, failures: dict[str, str]
) -> dict[str, list[dict[str, float]]]:
    """All systems in turn, round by round; one that fails is left out from then on."""
    rounds: dict[str, list[dict[str, float]]] = {}
    for index in range(num_rounds):
        for system in systems:
            if system.name in failures:
                continue
            say(f"round {index + 1} of {num_rounds}: {system.name}")
            others = OtherWork()
            try:
                figures = system.measure()
            except PeerError as error:
                say(f"{system.name}: {error}")
                failures[system.name] = str(error)
                continue
            figures[OTHER_CORES] = others.cores()
            say("  " + ", ".join(f"{name} {value:.1f}" for name, value in figures.items()))
            rounds.setdefault(system.name, []).append(figures)
    return rounds


def _document(
    heading: str,
    versions: dict[str, str],
    rounds: Rounds,
    found: Sequence[Ratio],
    failures: dict[str, str],
) -> dict[str, object]:
    return {
        "heading": heading,
        "versions": versions,
        "rounds": rounds,
        "medians": {name: medians(rows) for name, rows in rounds.items()},
        "ratios": [asdict(ratio) for ratio in found],
        "failures": failures,
    }


if __name__ == "__main__":
    sys.exit(main())
