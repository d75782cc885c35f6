"""The pure parts of benchmarks/peers_cpu.py."""

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmarks_are_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


ROUNDS = {
    "ours": [{"decode_tok_s": 20.0}, {"decode_tok_s": 30.0}, {"decode_tok_s": 24.0}],
    "slow": [{"decode_tok_s": 10.0, "prefill_tok_s": 50.0}, {"decode_tok_s": 10.0}, {"decode_tok_s": 12.0}],
    "fast": [{"decode_tok_s": 16.0}],
}


def test_ratios_pair_the_rounds_that_both_have() -> None:
    from peers.report import ratios

    slow, fast = ratios(ROUNDS, ["ours"], ["slow", "fast", "absent"])
    assert (slow.measure, slow.peer, slow.of_medians) == ("decode_tok_s", "slow", 2.4)
    assert (slow.lowest, slow.highest) == (2.0, 3.0)
    assert (fast.peer, fast.of_medians) == ("fast", 1.25)


def test_the_best_peer_has_the_highest_median() -> None:
    from peers.report import best_of

    assert best_of(ROUNDS, ["slow", "fast", "absent"], "decode_tok_s") == "fast"
    assert best_of(ROUNDS, ["fast"], "prefill_tok_s") is None


def test_the_table_has_only_columns_that_were_measured() -> None:
    from peers.report import markdown, ratios

    weights = {"ours": "MXFP4", "slow": "MXFP4", "fast": "Q4_0"}
    lines = markdown(ROUNDS, ratios(ROUNDS, ["ours"], ["fast"]), weights).splitlines()
    assert lines[0] == "| system | weights | prefill | decode |"
    assert lines[2] == "| ours | MXFP4 | – | 24.0 |"
    assert lines[-1] == "| decode | ours | fast | 1.25 × | 1.25–1.25 |"


def test_a_busy_machine_is_reported() -> None:
    from peers.report import disturbed

    rounds = {"quiet": [{"other_cores": 0.05}], "busy": [{"other_cores": 0.0}, {"other_cores": 0.7}]}
    assert disturbed(rounds) == {"busy": 0.7}


@pytest.mark.parametrize(
    ("flags", "avx512"),
    [({"avx512f", "avx512cd", "avx512vl", "avx512dq", "avx512bw"}, "ON"), ({"avx512f", "amx_tile"}, "OFF")],
)
def test_llama_cpp_is_built_for_the_flags_that_the_processor_has(flags: set[str], avx512: str) -> None:
    from peers.systems import cmake_arguments

    arguments = cmake_arguments(frozenset(flags)).split()
    assert f"-DGGML_AVX512={avx512}" in arguments
    assert "-DGGML_AVX2=OFF" in arguments
    assert "-DGGML_AMX_TILE=OFF" in arguments
