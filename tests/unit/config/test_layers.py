"""Which source of a setting wins, and what is said about keys that are wrong."""

import json
from pathlib import Path

import pytest

from localmoe.config.profiles import Profile
from localmoe.config.settings import Settings, load_settings
from localmoe.core.errors import ConfigError


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(f"LOCALMOE_{name.upper()}", raising=False)
    monkeypatch.delenv("LOCALMOE_ENGINE__CPU_LEVEL", raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "site.yaml"


def problem(text: str, file: Path) -> str:
    file.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load_settings(config=file)
    return str(raised.value)


def test_profile_below_file_below_environment_below_command_line(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_text("profile: low_latency\nport: 1\nengine:\n  tiers: {reserve_bytes: 5}\n")
    settings = load_settings(config=file)
    assert (settings.profile, settings.port, settings.config) == (Profile.LOW_LATENCY, 1, file)
    assert (settings.engine.max_num_seqs, settings.engine.tiers.reserve_bytes) == (4, 5)
    assert settings.engine.max_num_queued == 1000

    file.write_text("profile: low_latency\nengine:\n  max_num_seqs: 5\n  kv_cache_share: 0.3\n")
    monkeypatch.setenv("LOCALMOE_ENGINE__MAX_NUM_SEQS", "6")
    monkeypatch.setenv("LOCALMOE_ENGINE__TIERS__PREFETCH_LAYERS", "3")
    engine = load_settings(config=file).engine
    assert (engine.max_num_seqs, engine.kv_cache_share, engine.tiers.prefetch_layers) == (6, 0.3, 3)
    assert engine.tiers.reserve_bytes == 128 << 20

    monkeypatch.setenv("LOCALMOE_PROFILE", "high_throughput")
    engine = load_settings(config=file).engine
    assert (engine.max_num_seqs, engine.max_num_batched_tokens) == (6, 2048)
    settings = load_settings(config=file, profile=Profile.SMALL_MEMORY)
    assert settings.profile is Profile.SMALL_MEMORY
    assert (settings.engine.max_num_seqs, settings.engine.max_num_batched_tokens) == (6, 128)


def test_the_environment_may_name_the_file(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text("port: 1\n")
    monkeypatch.setenv("LOCALMOE_CONFIG", str(file))
    assert load_settings().port == 1
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"port": 2, "gateway": {"keepalive_s": 3}}))
    settings = load_settings(config=other)
    assert (settings.port, settings.gateway.keepalive_s) == (2, 3.0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LOCALMOE_CONFIG", "~/site.yaml")
    assert load_settings().port == 1


def test_a_block_whose_lines_are_all_comments_sets_nothing(file: Path) -> None:
    file.write_text("engine:\n  # max_num_seqs: 3\n  tiers:\nmemory_config:\n")
    assert load_settings(config=file).engine == load_settings().engine


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prot: 1", "'prot' is not a setting; did you mean 'port'?"),
        (
            "engine: {max_num_sequences: 1}",
            "'engine.max_num_sequences' is not a setting; did you mean 'engine.max_num_seqs'?",
        ),
        ("prefetch_layers: 1", "did you mean 'engine.tiers.prefetch_layers'?"),
        ("engine: {tiers: {disk: {depth_queue: 1}}}", "'engine.tiers.disk.depth_queue' is not a setting"),
        ("memory_config: {expert_treshold: 1}", "did you mean 'memory_config.expert_threshold'?"),
        ("gateway: {zzz: 1}", "'gateway.zzz' is not a setting; those of its block are max_body_bytes, "),
        ("7: 1", "'7' is not a setting"),
        ("config: other.yaml", "'config' cannot be set in a file; say it with --config or LOCALMOE_CONFIG"),
        ("port: yes", "'port' is True; it must be a number"),
        ("engine: {tiers: {disk: {timeout_s: on}}}", "'engine.tiers.disk.timeout_s' is True; it must be a number"),
        ("engine: 3", "'engine' is 3; it must be a block of settings"),
        ("compute_config: [enable_fusion]", "'compute_config' is ['enable_fusion']; it must be a block"),
    ],
)
def test_unknown_keys_are_refused_with_the_nearest_known_one(file: Path, text: str, said: str) -> None:
    message = problem(text, file)
    assert message.startswith(f"{file}: ")
    assert said in message


def test_every_unknown_key_gets_a_line(file: Path) -> None:
    lines = problem("prot: 1\nengine: {speculate: true, tiers: {ram: 1}}", file).splitlines()
    assert [line.split("'")[1] for line in lines] == ["prot", "engine.speculate", "engine.tiers.ram"]


@pytest.mark.parametrize(
    "key", ["swap_space", "use_v2_block_manager", "max_chunked_prefill_tokens", "zero_config"]
)
def test_retired_keys_say_what_became_of_them(file: Path, key: str) -> None:
    assert f"'{key}' is not a setting any more: " in problem(f"config_version: 2\n{key}: 4", file)
    assert f"'engine.{key}' is not a setting any more: " in problem(f"engine: {{{key}: 4}}", file)


def test_a_bad_value_says_where_it_is_set(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = problem("engine: {max_num_seqs: many}", file)
    assert message.startswith(f"setting 'engine.max_num_seqs' (file {file}): it is 'many': ")
    message = problem("engine: {tiers: {ram_bytes: 0}}", file)
    assert message == (f"setting 'engine.tiers.ram_bytes' (file {file}): ram_bytes is 0; it must be positive")
    message = problem("memory_config: {max_batch_size: -3}", file)
    assert message.startswith(f"setting 'engine.max_num_seqs' (an older key of file {file}): max_num_seqs is -3;")
    monkeypatch.setenv("LOCALMOE_ENGINE__MAX_NUM_SEQS", "0")
    message = problem("engine: {max_num_seqs: 5}", file)
    assert "(environment variable LOCALMOE_ENGINE__MAX_NUM_SEQS): max_num_seqs is 0; it must be" in message


def test_a_bad_value_of_any_size_is_said_shortly(file: Path) -> None:
    bomb = "".join(f"- &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    assert len(problem("port:\n- &a0 [1, 1]\n" + bomb, file)) < 5000


def test_an_unknown_profile_lists_those_there_are(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = problem("profile: fast", file)
    assert f"'profile' (file {file}): it is 'fast'" in message
    for profile in Profile:
        assert f"'{profile}'" in message
    assert "'profile'" in problem("profile: [1]", file)
    monkeypatch.setenv("LOCALMOE_PROFILE", "slow")
    with pytest.raises(ConfigError, match="LOCALMOE_PROFILE"):
        load_settings()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("engine: {hang_timeout_s: .inf}", "hang_timeout_s is inf; it must be at most"),
        ("engine: {hang_timeout_s: .nan}", "hang_timeout_s is nan; it must be positive"),
        ("engine: {kv_cache_share: .nan}", "kv_cache_share is nan"),
        ("engine: {expert_threshold: .nan}", "expert_threshold is nan"),
        ("engine: {tiers: {disk: {timeout_s: .nan}}}", "timeout_s is nan"),
        ("engine: {tiers: {disk: {timeout_s: .inf}}}", "timeout_s is inf"),
        ("gateway: {keepalive_s: .nan}", "keepalive_s is nan"),
        ("gateway: {body_timeout_s: .inf}", "body_timeout_s is inf"),
        ("engine: {num_threads: 100000}", "num_threads is 100000; it must be from 1 to 1024"),
        ("engine: {tiers: {prefetch_layers: 1000000}}", "prefetch_layers is 1000000; it must be from 0 to 256"),
        ("engine: {tiers: {placement: ram}}", "it is 'ram': it must be a list"),
        ("engine: {tiers: {ram_bytes: 1.5e0}}", "it is '1.5e0': input should be a valid integer"),
    ],
)
def test_values_that_make_no_sense_are_refused(file: Path, text: str, said: str) -> None:
    path = [part.strip(" {") for part in text.split(":")[:-1]]
    message = problem(text, file)
    assert message.startswith(f"setting '{'.'.join(path)}' (file {file}): ")
    assert said in message


@pytest.mark.parametrize(("text", "num_bytes"), [("1e9", 10**9), ("1.5e9", 15 * 10**8), ("2.0e+9", 2 * 10**9)])
def test_whole_numbers_may_have_exponents(
    file: Path, monkeypatch: pytest.MonkeyPatch, text: str, num_bytes: int
) -> None:
    file.write_text(f"engine: {{tiers: {{ram_bytes: {text}, vram_bytes: '{text}'}}}}")
    tiers = load_settings(config=file).engine.tiers
    assert (tiers.ram_bytes, tiers.vram_bytes) == (num_bytes, num_bytes)
    monkeypatch.setenv("LOCALMOE_ENGINE__TIERS__RAM_BYTES", text)
    assert load_settings().engine.tiers.ram_bytes == num_bytes
