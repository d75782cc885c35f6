"""What was measured, as ratios and a Markdown table. Pure functions."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Figures = Mapping[str, float]
"""Measure → tokens a second, of one system in one round."""
Rounds = Mapping[str, Sequence[Figures]]
"""System → its rounds."""

COLUMNS = {
    "prefill_tok_s": "prefill",
    "decode_tok_s": "decode",
    "aggregate_8_tok_s": "8 streams",
    "aggregate_16_tok_s": "16 streams",
    "moe_1_tok_s": "MoE layers, 1 token",
    "moe_512_tok_s": "MoE layers, 512 tokens",
}
"""Measure → what the tables call it."""

OTHER_CORES = "other_cores"
"""Beside the measures: how many cores other programs kept busy meanwhile."""
QUIET_CORES = 0.1


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times a peer's speed ours is."""

    measure: str
    ours: str
    peer: str
    of_medians: float
    lowest: float
    """Of the ratios of single rounds."""
    highest: float


def medians(rounds: Sequence[Figures]) -> dict[str, float]:
    """Median of each measure over the rounds that have it."""
    names = {name: None for figures in rounds for name in figures}
    return {name: statistics.median(f[name] for f in rounds if name in f) for name in names}


def best_of(rounds: Rounds, candidates: Sequence[str], measure: str) -> str | None:
    """The candidate with the highest median, None if none has the measure."""
    measured = {name: medians(rounds[name]) for name in candidates if name in rounds}
    having = [name for name, figures in measured.items() if measure in figures]
    return max(having, key=lambda name: measured[name][measure], default=None)


def ratios(rounds: Rounds, ours: Sequence[str], peers: Sequence[str]) -> list[Ratio]:
    """Every pair of one of ours and a peer, for every measure that both have."""
    found = []
    for measure in COLUMNS:
        for our_name in ours:
            for peer in peers:
                pairs = [
                    (a[measure], b[measure])
                    for a, b in zip(rounds.get(our_name, ()), rounds.get(peer, ()), strict=False)
                    if measure in a and measure in b
                ]
                if not pairs:
                    continue
                single = [a / b for a, b in pairs]
                found.append(
                    Ratio(
                        measure=measure,
                        ours=our_name,
                        peer=peer,
                        of_medians=statistics.median(a for a, _ in pairs) / statistics.median(b for _, b in pairs),
                        lowest=min(single),
                        highest=max(single),
                    )
                )
    return found


def markdown(rounds: Rounds, found: Sequence[Ratio], weights: Mapping[str, str]) -> str:
    """Two tables: tokens a second of each system, medians; and the ratios.

    Args:
        weights: system → what its weights are stored as.
    """
    used = [name for name in COLUMNS if any(name in figures for rows in rounds.values() for figures in rows)]
    lines = _row("system", "weights", *(COLUMNS[name] for name in used))
    lines += _rule(2 + len(used))
    for system, rows in rounds.items():
        figures = medians(rows)
        cells = (f"{figures[name]:.1f}" if name in figures else "–" for name in used)
        lines += _row(system, weights[system], *cells)
    lines += ["", *_row("measure", "ours", "against", "ratio of medians", "single rounds"), *_rule(5)]
    for ratio in found:
        spread = f"{ratio.lowest:.2f}–{ratio.highest:.2f}"
        name = COLUMNS[ratio.measure]
        lines += _row(name, ratio.ours, ratio.peer, f"{ratio.of_medians:.2f} ×", spread)
    return "\n".join(lines)


def disturbed(rounds: Rounds) -> dict[str, float]:
    """Systems that did not have the machine to themselves → the cores that others used, at most."""
    most = {name: max((row.get(OTHER_CORES, 0.0) for row in rows), default=0.0) for name, rows in rounds.items()}
    return {name: cores for name, cores in most.items() if cores > QUIET_CORES}


def _row(*cells: str) -> list[str]:
    return ["| " + " | ".join(cells) + " |"]


def _rule(num_columns: int) -> list[str]:
    return ["|" + "---|" * num_columns]
