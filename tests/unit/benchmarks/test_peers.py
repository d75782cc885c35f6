"""The pure parts of benchmarks/peers_cpu.py."""

import json
from pathlib import Path

import pytest

from localmoe.bench.shapes import find_model
from support.bench_models import write_moe_gguf

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


def test_our_layers_count_as_a_pass_through_all_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peers import systems

    def times(weights: str, **median_us: float) -> list[dict[str, object]]:
        return [
            {"kernel": "moe", "format": weights, "tokens": int(tokens[1:]), "median_us": us}
            for tokens, us in median_us.items()
        ]

    rows = times("mxfp4", t1=500.0, t8=900.0, t512=16000.0) + times("int8", t1=1.0)
    report = json.dumps({"level": "avx2", "kernels": rows})
    monkeypatch.setattr(systems, "run", lambda command, log: report)
    setting = systems.Setting(
        workdir=tmp_path,
        shape_name="olmoe-1b-7b",
        shape=find_model("olmoe-1b-7b").shape,
        threads=2,
        cpu_flags=frozenset(),
    )
    figures = systems.LocalMoELayers(setting).measure()
    assert figures == pytest.approx({"moe_1_tok_s": 125.0, "moe_512_tok_s": 2000.0})


@pytest.mark.parametrize("arch", ["olmoe", "qwen3moe"])
def test_a_file_of_random_blocks_has_the_shape_it_was_made_from(tmp_path: Path, arch: str) -> None:
    from peers.bench_gguf import write_gguf

    shape = find_model(str(write_moe_gguf(tmp_path / "small.gguf", arch))).shape
    write_gguf(tmp_path / "random.gguf", shape, "mxfp4")
    assert find_model(str(tmp_path / "random.gguf")).shape == shape


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
