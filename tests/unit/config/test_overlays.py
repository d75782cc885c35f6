"""Overlays of environments, and the order of all layers."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.config.layers import Layer, has, merge_all, setter, value_at
from localmoe.config.settings import ConfigSource, load_settings, read_settings
from localmoe.core.errors import ConfigError

TREES = st.recursive(
    st.integers(0, 9) | st.lists(st.integers(0, 9), max_size=2),
    lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=8,
)
BLOCKS = st.dictionaries(st.sampled_from("abc"), TREES, max_size=3)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "site.yaml"
    path.write_text("port: 1\nengine: {max_num_seqs: 2, block_tokens: 32}\nmodels: [{model: a}, {model: b}]\n")
    (tmp_path / "site.production.yaml").write_text("port: 3\nengine: {max_num_seqs: 4}\nmodels: [{model: c}]\n")
    return path


def test_an_overlay_goes_over_its_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings(config=file).port == 1
    settings = load_settings(config=file, env="production")
    assert (settings.port, settings.engine.max_num_seqs, settings.engine.block_tokens) == (3, 4, 32)
    assert [model.model for model in settings.models] == ["c"]
    monkeypatch.setenv("LOCALMOE_ENV", "production")
    assert load_settings(config=file).port == 3
    monkeypatch.setenv("LOCALMOE_CONFIG", str(file))
    assert load_settings().port == 3
    monkeypatch.setenv("LOCALMOE_PORT", "5")
    assert load_settings().port == 5


def test_the_command_line_names_the_environment_first(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.with_name("site.test.yaml").write_text("port: 7")
    monkeypatch.setenv("LOCALMOE_ENV", "production")
    assert load_settings(config=file, env="test").port == 7


def test_an_overlay_that_is_not_there_is_named(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"site\.prodution\.yaml: No such file"):
        load_settings(config=file, env="prodution")
    with pytest.raises(ConfigError, match=r"env is '\.\./etc'; it must be up to 64 letters"):
        load_settings(config=file, env="../etc")
    notes: list[str] = []
    load_settings(env="production", on_note=notes.append)
    assert notes == ["env is 'production', but there is no configuration file that it could have an overlay for"]


@pytest.mark.parametrize("name", ["config", "env"])
def test_what_names_files_is_not_in_one(tmp_path: Path, name: str) -> None:
    path = tmp_path / "site.yaml"
    path.write_text(f"{name}: other")
    with pytest.raises(ConfigError, match=f"'{name}' cannot be set in a file; say it with --{name} or LOCALMOE_"):
        load_settings(config=path)


def test_each_setting_says_where_it_is_from(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMOE_DISPATCH", '{"max_queued": 8}')
    file.write_text("profile: small_memory\nengine: {block_tokens: 32}\nmemory_config: {prefetch_layers: 1}\n")
    source = ConfigSource(config=file, env="production", flags={("engine", "device"): "cpu"})
    loaded = read_settings(source)
    origins = {
        "config": "--config",
        "env": "--env",
        "engine.device": "--device",
        "dispatch.max_queued": "environment variable LOCALMOE_DISPATCH",
        "engine.max_num_seqs": f"file {file.with_name('site.production.yaml')}",
        "engine.block_tokens": f"file {file}",
        "engine.tiers.prefetch_layers": f"an older key of file {file}",
        "engine.kv_cache_share": "profile small_memory",
        "host": "default",
    }
    assert {key: loaded.origin(key.split(".")) for key in origins} == origins
    assert loaded.settings.engine.device == "cpu"
    assert list(loaded.files) == [file.with_name("site.production.yaml"), file]
    assert loaded.files[file] == file.read_bytes()


def test_what_is_read_can_be_said_in_place_of_a_file(file: Path) -> None:
    loaded = read_settings(ConfigSource(config=file), {file: b"port: 99"})
    assert (loaded.settings.port, loaded.files) == (99, {file: b"port: 99"})


@given(blocks=st.lists(BLOCKS, min_size=1, max_size=4))
def test_the_upper_layer_has_the_last_word(blocks: list[dict[str, Any]]) -> None:
    layers = [Layer(values=block, origin=str(at)) for at, block in enumerate(blocks)]
    result = merge_all(layers)
    for path in _leaves(result):
        top = setter(path, layers)
        assert top is not None
        assert value_at(top.values, path) == value_at(result, path)
    for block in blocks:
        for path in _leaves(block):
            hidden = any(_covers(value_at_depth(other.values, path)) for other in layers[: blocks.index(block)])
            assert has(result, path) or hidden


@given(a=BLOCKS, b=BLOCKS, c=BLOCKS)
def test_merging_two_first_or_last_is_the_same(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> None:
    """As long as nothing is a block in one layer and a value in another, which the schema sees to."""
    if _clash(a, b) or _clash(b, c) or _clash(a, c):
        return
    one, two, three = (Layer(values=values, origin="") for values in (a, b, c))
    below = Layer(values=merge_all([two, three]), origin="")
    above = Layer(values=merge_all([one, two]), origin="")
    assert merge_all([one, below]) == merge_all([above, three]) == merge_all([one, two, three])
    assert json.dumps(merge_all([one])) == json.dumps(a)


def _leaves(values: object, *path: str) -> list[tuple[str, ...]]:
    if isinstance(values, dict) and values:
        return [leaf for name, value in values.items() for leaf in _leaves(value, *path, name)]
    return [path] if path else []


def value_at_depth(values: Any, path: tuple[str, ...]) -> list[Any]:
    """What there is at each depth of a path."""
    found = []
    for part in path:
        if not isinstance(values, dict) or part not in values:
            break
        values = values[part]
        found.append(values)
    return found


def _covers(found: list[Any]) -> bool:
    return any(not isinstance(value, dict) for value in found)


def _clash(a: Any, b: Any) -> bool:
    if isinstance(a, dict) != isinstance(b, dict):
        return True
    return isinstance(a, dict) and any(_clash(a[name], b[name]) for name in a.keys() & b.keys())
