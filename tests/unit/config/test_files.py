import os
from pathlib import Path

import pytest

from localmoe.config.files import parse_config, read_config_bytes
from localmoe.core.errors import ConfigError


def read_config_file(path: Path) -> object:
    return parse_config(read_config_bytes(path), path)


def read(tmp_path: Path, text: str | bytes, name: str = "settings.yaml") -> object:
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return read_config_file(path)


def problem(tmp_path: Path, text: str | bytes, name: str = "settings.yaml") -> str:
    with pytest.raises(ConfigError) as raised:
        read(tmp_path, text, name)
    message = str(raised.value)
    assert str(tmp_path / name) in message
    return message


def test_yaml_and_json_hold_the_same(tmp_path: Path) -> None:
    expected = {"port": 9000, "engine": {"speculation": False, "kv_cache_share": 0.5}}
    assert read(tmp_path, "port: 9000\nengine:\n  speculation: false\n  kv_cache_share: 0.5\n") == expected
    text = '{"port": 9000,\n\t"engine": {"speculation": false, "kv_cache_share": 5e-1}}'
    assert read(tmp_path, text, "settings.json") == expected


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '{"engine": {"max_num_seqs": 9223372036854775808}}',
            "'max_num_seqs' has an integer of more than 64 bits",
        ),
        ('{"models": [{"model": "\\udc80"}]}', "'model' has text in it that is not Unicode"),
        ('{"other_engines": {"\\udc80": 1}}', "'other_engines' has text in it that is not Unicode"),
        ('{"models": ' + "[" * 40 + "]" * 40 + "}", "is nested too deeply"),
    ],
)
def test_what_could_not_be_kept_or_shown_is_refused(text: str, said: str) -> None:
    for name in ("site.json", "site.yaml"):
        with pytest.raises(ConfigError) as raised:
            parse_config(text.encode(), Path(name))
        assert said in str(raised.value)


@pytest.mark.parametrize("text", ["", "# nothing but this\n", "---\n"])
def test_an_empty_file_sets_nothing(tmp_path: Path, text: str) -> None:
    assert read(tmp_path, text) == {}


@pytest.mark.parametrize("text", ["5", "- port: 1", "port"])
def test_a_file_must_hold_names_and_values(tmp_path: Path, text: str) -> None:
    assert "holds no settings" in problem(tmp_path, text)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("port: 1\nport: 2\n", 2),
        ("engine:\n  block_tokens: 16\n  speculation: true\n  block_tokens: 32\n", 4),
        ("host: [{a: 1, b: 2,\n a: 3}]\n", 2),
    ],
)
def test_a_key_that_is_set_twice_is_refused(tmp_path: Path, text: str, line: int) -> None:
    message = problem(tmp_path, text)
    assert "is set twice in one block" in message
    assert message.endswith(f"in line {line}")


def test_a_key_that_is_set_twice_is_refused_in_json(tmp_path: Path) -> None:
    assert "'port' is set twice" in problem(tmp_path, '{"engine": {"port": 1, "port": 2}}', "settings.json")


def test_one_name_in_two_blocks_is_none_twice(tmp_path: Path) -> None:
    assert read(tmp_path, "a: {x: 1}\nb: {x: 1}\n") == {"a": {"x": 1}, "b": {"x": 1}}


@pytest.mark.parametrize(
    ("value", "kind"), [("!!binary YQ==", "bytes"), ("2001-12-30", "date"), ("!!set {b}", "set")]
)
def test_what_only_yaml_has_is_refused(tmp_path: Path, value: str, kind: str) -> None:
    assert f"'a' is of YAML's type '{kind}'" in problem(tmp_path, f"a: {value}\n")


def test_objects_are_not_made(tmp_path: Path) -> None:
    made = tmp_path / "made"
    assert "is not YAML" in problem(tmp_path, f"host: !!python/object/apply:os.mkdir [{made}]\n")
    assert not made.exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("settings.yaml", "a: [1\nb: 2"),
        ("settings.yaml", "a: 2001-13-40"),
        ("settings.yaml", "a: \x01"),
        ("settings.yaml", "a: !!bool maybe"),
        ("settings.yaml", 'a: !!int ""'),
        ("settings.yaml", "a: !!timestamp soon"),
        ("settings.json", "{'a': 1}"),
        ("settings.json", ""),
    ],
)
def test_what_cannot_be_parsed_is_refused(tmp_path: Path, name: str, text: str) -> None:
    assert "is not " in problem(tmp_path, text, name)


def test_hostile_files_are_refused_quickly(tmp_path: Path) -> None:
    assert "is not UTF-8" in problem(tmp_path, b"host: \xff\xfe")
    assert "larger than" in problem(tmp_path, b"#" * ((1 << 20) + 1))
    assert "nested too deeply" in problem(tmp_path, "[" * 100_000)
    assert "nested too deeply" in problem(tmp_path, "[" * 100_000, "settings.json")
    # Each line names the one before twice: 2^40 numbers if they were written out.
    bomb = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))
    assert "aliases (`*`) stand for more than" in problem(tmp_path, bomb)
    assert "an alias in line 1 stands for what it is in" in problem(tmp_path, "a: &a [1, [*a]]\n")
    shared = "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 10))
    assert len(read(tmp_path, "a0: &a0 [1, 1]\n" + shared)) == 10  # type: ignore[arg-type]


def test_merge_keys_and_keys_that_are_blocks_are_refused_quickly(tmp_path: Path) -> None:
    # Each line merges the one before nine times, which PyYAML would write out: 9^12 pairs.
    lines = ["a0: &a0 {x: 1}"] + [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, 13)]
    assert "merge keys (`<<`) are not supported; there is one in line" in problem(tmp_path, "\n".join(lines))
    lines = ["a0: &a0 [1, 1]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 40)]
    assert "a name must be plain text" in problem(tmp_path, "\n".join([*lines, "? *a39\n: 1"]))


@pytest.mark.parametrize("name", ["settings.yaml", "settings.json"])
def test_an_integer_of_too_many_digits_is_refused_in_a_line(tmp_path: Path, name: str) -> None:
    message = problem(tmp_path, '{"port": ' + "9" * 5001 + "}", name)
    assert "digits" in message
    assert "\n" not in message
    assert len(message) < 500


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothing\.yaml: No such file"):
        read_config_file(tmp_path / "nothing.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        read_config_file(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    path = tmp_path / "secret.yaml"
    path.write_text("port: 1")
    path.chmod(0)
    with pytest.raises(ConfigError, match="Permission denied"):
        read_config_file(path)
