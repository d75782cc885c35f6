"""Profiles, their examples, and the tuning blocks of the first design documents."""

import copy
from pathlib import Path

import pytest

from localmoe.config.profiles import PROFILES, Profile
from localmoe.config.seed_keys import RETIRED_KEYS, TUNING_BLOCKS
from localmoe.config.settings import Settings, load_settings
from localmoe.core.errors import ConfigError
from localmoe.engine.config import EngineConfig

ROOT = Path(__file__).parents[3]
EXAMPLES = ROOT / "examples/configs"

LOW_LATENCY = """
memory_config:
  max_gpu_layers: 2
  prefetch_layers: 1
  expert_threshold: 0.2
  min_batch_size: 1

compute_config:
  enable_fusion: true
  overlap_io: true
  use_cuda_graph: true
"""
HIGH_THROUGHPUT = """
memory_config:
  max_gpu_layers: 4
  prefetch_layers: 2
  expert_threshold: 0.1
  max_batch_size: 32

compute_config:
  enable_fusion: true
  overlap_compute: true
  use_parallel_compute: true
"""
BALANCED = """
memory_config:
  max_gpu_layers: 3
  prefetch_layers: 2
  expert_threshold: 0.15
  dynamic_batch: true

compute_config:
  enable_fusion: true
  auto_tune: true
  adaptive_schedule: true
"""


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"LOCALMOE_{name.upper()}", raising=False)
    monkeypatch.delenv("LOCALMOE_ENGINE__CPU_LEVEL", raising=False)


def test_auto_is_the_defaults() -> None:
    settings = load_settings()
    assert settings.profile is Profile.AUTO
    assert settings.engine == load_settings(profile=Profile.AUTO).engine == EngineConfig()


def test_profiles_differ_and_none_is_lossy() -> None:
    before = copy.deepcopy(PROFILES)
    engines = [load_settings(profile=profile).engine for profile in Profile]
    assert len(set(engines)) == len(Profile) == len(PROFILES)
    assert not any(engine.expert_threshold or engine.adaptive_expert_threshold for engine in engines)
    assert before == PROFILES


def test_profiles_are_ordered_by_what_they_are_for() -> None:
    latency, balanced, throughput = (
        load_settings(profile=profile).engine
        for profile in (Profile.LOW_LATENCY, Profile.BALANCED, Profile.HIGH_THROUGHPUT)
    )
    for name in ("max_num_seqs", "max_num_batched_tokens", "kv_cache_share"):
        assert getattr(latency, name) < getattr(balanced, name) < getattr(throughput, name)
    small, default = load_settings(profile=Profile.SMALL_MEMORY).engine, EngineConfig()
    assert small.kv_cache_share < default.kv_cache_share
    assert small.tiers.reserve_bytes > default.tiers.reserve_bytes


@pytest.mark.parametrize("path", [EXAMPLES / f"{profile}.yaml" for profile in Profile if profile != Profile.AUTO])
def test_an_example_is_its_profile_written_out(path: Path, tmp_path: Path) -> None:
    profile = Profile(path.stem)
    settings = load_settings(config=path)
    assert settings.profile is profile
    lines = tmp_path / path.name
    lines.write_text(path.read_text().replace(f"profile: {profile}\n", ""))
    alone = load_settings(config=lines)
    assert alone.profile is Profile.AUTO
    assert alone.engine == settings.engine == load_settings(profile=profile).engine


@pytest.mark.parametrize(
    ("text", "prefetch_layers", "max_num_seqs"),
    [(LOW_LATENCY, 1, 64), (HIGH_THROUGHPUT, 2, 32), (BALANCED, 2, 64)],
    ids=["low latency", "high throughput", "balanced"],
)
def test_the_first_tuning_blocks_load(tmp_path: Path, text: str, prefetch_layers: int, max_num_seqs: int) -> None:
    path = tmp_path / "tuning.yaml"
    path.write_text(text)
    notes: list[str] = []
    engine = load_settings(config=path, on_note=notes.append).engine
    assert (engine.tiers.prefetch_layers, engine.max_num_seqs) == (prefetch_layers, max_num_seqs)
    assert engine.expert_threshold == 0
    keys = [line.split(":")[0].strip() for line in text.splitlines() if line.startswith("  ")]
    assert [note.split(": ")[1].split(".")[1] for note in notes] == keys
    assert all(note.startswith(f"{path}: ") for note in notes)
    lossy = next(note for note in notes if "memory_config.expert_threshold" in note)
    assert "not applied" in lossy
    assert "lossy" in lossy
    assert "engine.expert_threshold" in lossy


def test_notes_are_logged_where_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "tuning.yaml"
    path.write_text("memory_config: {min_batch_size: 1}")
    with caplog.at_level("INFO"):
        load_settings(config=path)
    assert caplog.messages == [f"{path}: memory_config.min_batch_size: continuous batching does not wait; ignored"]


def test_our_own_setting_goes_before_a_tuning_key_and_that_before_the_profile(tmp_path: Path) -> None:
    path = tmp_path / "tuning.yaml"
    path.write_text(HIGH_THROUGHPUT + "engine: {expert_threshold: 0.05, max_num_seqs: 8}\n")
    engine = load_settings(config=path, profile=Profile.LOW_LATENCY).engine
    assert (engine.expert_threshold, engine.max_num_seqs, engine.tiers.prefetch_layers) == (0.05, 8, 2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("memory_config: {min_batch_size: few}", "memory_config.min_batch_size is 'few'; it must be of type int"),
        ("memory_config: {max_gpu_layers: true}", "memory_config.max_gpu_layers is True; it must be of type int"),
        ("memory_config: {expert_threshold: high}", "it must be of type float"),
        ("compute_config: {auto_tune: 1}", "compute_config.auto_tune is 1; it must be of type bool"),
    ],
)
def test_a_tuning_key_of_another_kind_is_refused(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "tuning.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_settings(config=path)
    assert str(raised.value).startswith(f"{path}: ")
    assert said in str(raised.value)


def test_what_a_tuning_key_sets_is_a_setting() -> None:
    for block, keys in TUNING_BLOCKS.items():
        for name, key in keys.items():
            component: object = Settings.model_construct()
            for part in key.setting or ():
                component = getattr(component, part)
            assert key.note, f"{block}.{name}"


def test_the_documentation_has_every_key() -> None:
    text = (ROOT / "docs/settings.md").read_text()
    keys = {key for block in TUNING_BLOCKS.values() for key in block} | {*RETIRED_KEYS} | {*Profile}
    assert [key for key in sorted(keys) if f"`{key}`" not in text] == []


def test_the_documentation_has_what_profiles_set() -> None:
    rows = [line.split("|")[1:-1] for line in (ROOT / "docs/settings.md").read_text().splitlines() if "|" in line]
    table = {cells[0].strip(" `"): [cell.strip(" `") for cell in cells[1:]] for cells in rows if len(cells) == 6}
    columns = table["setting"]
    for name, values in table.items():
        if name == "setting" or name.startswith("-"):
            continue
        for column, value in zip(columns, values, strict=True):
            found: object = load_settings(profile=Profile(column)).engine
            for part in name.split("."):
                found = getattr(found, part)
            written = {"None": "the model's", "True": "on", "False": "off"}.get(str(found), str(found))
            assert value == written, (name, column)
    set_anywhere = {
        name if name != "tiers" else f"tiers.{inner}"
        for values in PROFILES.values()
        for name, value in values.get("engine", {}).items()
        for inner in (value if name == "tiers" else [""])
    }
    assert set_anywhere <= {*table}
