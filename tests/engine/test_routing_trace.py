"""What the recorder writes, `read_trace` reads, whatever becomes of the engine or its disk."""

import gzip
import resource
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from localmoe.bench.cache import measure_cache
from localmoe.core.model import ModelShape
from localmoe.core.plans import SequenceStep
from localmoe.core.request import SamplingParams
from localmoe.engine import routing_trace
from localmoe.engine.config import EngineConfig
from localmoe.engine.load import load_engine, warm_up
from localmoe.engine.routing_trace import RoutingRecorder
from localmoe.formats.store import Store
from localmoe.residency.trace import read_trace
from localmoe.tiers.config import TiersConfig
from support.models import greedy, run

L, E, K = 3, 8, 2
SHAPE = ModelShape(
    model_type="mixtral",
    num_layers=L,
    hidden_size=4,
    num_heads=1,
    num_kv_heads=1,
    head_dim=4,
    num_experts=E,
    top_k=K,
    expert_size=4,
    vocab_size=10,
    max_context_tokens=10,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
)
EXPERT_BYTES = 1000
NAMES = ["a.csv", "a.route.csv.gz"]


def sequence(sequence_id: int, start: int, num_tokens: int, num_drafts: int = 0) -> SequenceStep:
    return SequenceStep(
        sequence_id=sequence_id,
        token_ids=(0,) * num_tokens,
        num_drafts=num_drafts,
        start=start,
        block_table=(),
        samples=True,
        sampling=SamplingParams(max_tokens=1),
        seed=0,
        history=([], []),
        scores_prompt=False,
    )


class Router:
    """Feeds a recorder with random choices, and remembers them as a reader should find them."""

    def __init__(self, recorder: RoutingRecorder) -> None:
        self.recorder = recorder
        self.uses: list[tuple[int, list[list[int]], bool]] = []
        self._rng = np.random.default_rng(0)

    def step(self, *sequences: SequenceStep, present_E: NDArray[np.bool_] | None = None) -> None:
        self.recorder.begin_step(sequences)
        for layer in range(L):
            num_tokens = sum(len(step.token_ids) for step in sequences)
            ids_TK = np.stack([self._rng.permutation(E)[:K] for _ in range(num_tokens)]).astype(np.int32)
            weights_TK = torch.tensor([[0.75, 1 / 3e5]]).expand(num_tokens, K)
            present = np.ones(E, np.bool_) if present_E is None else present_E
            self.recorder.record(layer, torch.from_numpy(ids_TK), weights_TK, present)
            row = 0
            for step in sequences:
                ids = ids_TK[row : row + len(step.token_ids)].tolist()
                row += len(ids)
                is_prompt = len(ids) > step.num_drafts + 1
                self.uses += [(layer, ids, True)] if is_prompt else [(layer, [one], False) for one in ids]


def make_recorder(path: Path, **options: int) -> RoutingRecorder:
    return RoutingRecorder(path, "tiny", SHAPE, EXPERT_BYTES, **options)


def found_uses(path: Path) -> list[tuple[int, list[list[int]], bool]]:
    return [(use.layer, use.experts.tolist(), use.is_prompt) for use in read_trace(path).uses]


def lines_of(path: Path) -> list[str]:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.name.endswith(".gz") else content).decode().splitlines()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_recorded_is_read_again(tmp_path: Path, name: str) -> None:
    router = Router(make_recorder(tmp_path / name))
    router.step(sequence(0, 0, 5))
    router.step(sequence(0, 5, 1), sequence(7, 0, 3))
    router.step(sequence(0, 6, 1), sequence(7, 3, 1))
    router.recorder.flush()
    router.step(sequence(0, 7, 3, num_drafts=2), sequence(7, 4, 1))
    router.recorder.flush()
    trace = read_trace(tmp_path / name)
    assert (trace.model, trace.num_layers, trace.num_experts) == ("tiny", L, E)
    assert found_uses(tmp_path / name) == router.uses
    assert (tmp_path / name).read_bytes().startswith(b"\x1f\x8b") == name.endswith(".gz")


def test_columns_are_those_of_other_traces(tmp_path: Path) -> None:
    recorder = make_recorder(tmp_path / "a.csv")
    recorder.begin_step([sequence(4, 9, 2)])
    present_E = np.zeros(E, np.bool_)
    present_E[3] = True
    ids_TK = torch.tensor([[3, 5], [5, 3]], dtype=torch.int32)
    recorder.record(2, ids_TK, torch.tensor([[0.75, 0.25], [1 / 3, 1e-9]]), present_E)
    recorder.flush()
    assert lines_of(tmp_path / "a.csv")[1:] == [
        "# model=tiny n_layer=3 n_expert=8 n_expert_used=2",
        "turn,phase,step,layer,slot,expert,weight,residency,expert_bytes",
        "4,0,9,2,0,3,0.75,1,0",
        "4,0,9,2,1,5,0.25,0,1000",
        "4,0,10,2,0,5,0.333333,0,0",
        "4,0,10,2,1,3,1e-09,1,0",
    ]


@pytest.mark.parametrize("model", ["a b n_layer=9", "m\nodel", "größe", "x" * 5000, "a=b"])
def test_no_name_of_a_model_spoils_the_file(tmp_path: Path, model: str) -> None:
    router = Router(RoutingRecorder(tmp_path / "a.csv", model, SHAPE, EXPERT_BYTES))
    router.step(sequence(0, 0, 1))
    router.recorder.flush()
    trace = read_trace(tmp_path / "a.csv")
    assert (trace.num_layers, len(trace.uses)) == (L, L)
    assert found_uses(tmp_path / "a.csv") == router.uses


@pytest.mark.parametrize("name", NAMES)
def test_what_exists_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"precious")
    stem, _, suffixes = name.rpartition(".csv")
    for number in (2, 3):
        router = Router(make_recorder(tmp_path / name))
        router.step(sequence(0, 0, 1))
        router.recorder.flush()
        assert found_uses(tmp_path / f"{stem}.{number}.csv{suffixes}") == router.uses
    assert (tmp_path / name).read_bytes() == b"precious"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_bounded_and_the_file_is_whole_at_any_time(tmp_path: Path, name: str) -> None:
    router = Router(make_recorder(tmp_path / name))
    router.step(sequence(0, 0, 1))
    router.recorder.flush()
    sizes = set()
    for chunk in range(30):
        router.step(sequence(1, 300 * chunk, 300), sequence(0, 1 + chunk, 1))
        assert router.recorder._buffered_bytes < 300_000
        assert sum(map(len, router.recorder._lines)) == router.recorder._buffered_bytes
        if chunk % 3:
            continue
        uses = found_uses(tmp_path / name)  # as a kill would leave it
        assert uses == router.uses[: len(uses)]
        sizes.add(len(uses))
    assert len(sizes) > 5


def test_little_is_written_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routing_trace, "_LONGEST_BUFFERED_S", 0.02)
    router = Router(make_recorder(tmp_path / "a.csv"))
    router.step(sequence(0, 0, 1))
    assert (tmp_path / "a.csv").read_bytes() == b""
    time.sleep(0.03)
    router.step(sequence(0, 1, 1))
    assert found_uses(tmp_path / "a.csv") == router.uses[:L]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 100,000 bytes, which is told as a full disk is."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_ends_the_recording_and_nothing_else(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    router = Router(make_recorder(tmp_path / name))
    router.step(sequence(0, 0, 1))
    num_steps = 0
    while router.recorder.is_on:
        router.step(sequence(1, 100 * num_steps, 100))
        router.recorder.flush()
        num_steps += 1
        assert num_steps < 1000
    for _ in range(3):
        router.step(sequence(0, 1, 1))
        router.recorder.flush()
    [message] = [message for message in caplog.messages if "no longer recorded" in message]
    assert name in message
    uses = found_uses(tmp_path / name)
    assert len(uses) == L * num_steps  # all but the last
    assert uses == router.uses[: len(uses)]
    assert router.recorder._lines == []


@pytest.mark.parametrize("name", NAMES)
def test_a_file_grows_no_larger_than_may_be_read(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    router = Router(make_recorder(tmp_path / name, max_bytes=2000))
    for position in range(30):
        router.step(sequence(0, position, 1))
        router.recorder.flush()
    assert not router.recorder.is_on
    assert "2000 bytes are enough" in caplog.text
    assert 1500 < sum(len(line) + 1 for line in lines_of(tmp_path / name)) <= 2000
    uses = found_uses(tmp_path / name)
    assert uses == router.uses[: len(uses)]


def test_a_folder_that_is_not_there_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    router = Router(make_recorder(tmp_path / "missing" / "a.csv"))
    router.step(sequence(0, 0, 1))
    router.recorder.flush()
    assert not router.recorder.is_on
    assert "routing is not recorded" in caplog.text
    assert "No such file or directory" in caplog.text


def recorded(home: Path, path: Path, prompts: Sequence[list[int]], config: EngineConfig) -> dict[str, list[int]]:
    """The tokens of requests served at once by an engine that does not fit in memory, its routing recorded."""
    store_path = home / "models/distinct-experts/stores/f32.store"
    with Store.open(store_path) as store:
        available_bytes = store.total_bytes
    engine = load_engine("distinct experts", store_path, config, available_bytes)
    assert engine.state().tiers is not None
    warm_up(engine)
    engine.record_routing(path)
    tokens = run(engine, [greedy(str(index), prompt, 12) for index, prompt in enumerate(prompts)])
    engine.rest()
    inspection = engine.inspect()
    trace = read_trace(path)
    heat_LE = np.zeros((trace.num_layers, trace.num_experts), np.int64)
    for use in trace.uses:
        np.add.at(heat_LE[use.layer], use.experts, 1)
    assert heat_LE.tolist() == inspection.heat
    return tokens


@pytest.mark.parametrize("threshold", [0.0, 0.4])
def test_an_engine_records_what_its_router_chose(tiny_home: Path, tmp_path: Path, threshold: float) -> None:
    config = EngineConfig(
        num_threads=2,
        max_num_batched_tokens=8,
        max_num_seqs=3,
        max_context_tokens=64,
        expert_threshold=threshold,
        tiers=TiersConfig(reserve_bytes=0),
    )
    prompts = [[5, 6, 7, 8] * 4, [9], [1, 2, 3]]
    tokens = recorded(tiny_home, tmp_path / "a.csv.gz", prompts, config)
    fields = [line.split(",") for line in lines_of(tmp_path / "a.csv.gz")[3:]]
    # Every position of every sequence, all tokens but the last of each.
    positions: dict[str, set[int]] = {}
    for turn, _, position, *_ in fields:
        positions.setdefault(turn, set()).add(int(position))
    lengths = sorted(len(prompt) + len(tokens[str(i)]) - 1 for i, prompt in enumerate(prompts))
    assert sorted(max(found) + 1 for found in positions.values()) == lengths
    assert all(found == set(range(max(found) + 1)) for found in positions.values())
    assert {field[7] for field in fields} == {"0", "1"}
    read = [field for field in fields if field[8] != "0"]
    assert read
    assert all(field[7] == "0" for field in read)
    assert 0 < measure_cache(read_trace(tmp_path / "a.csv.gz"), 0.3).lru < 1
    other = recorded(tiny_home, tmp_path / "b.csv", prompts, replace(config, prefix_caching=False))
    assert other == tokens
