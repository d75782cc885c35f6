"""Single settings changed in a file that keeps its comments, order and layout."""

import json
import os
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmoe.config.atomic_files import write_atomically
from localmoe.config.editing import edited
from localmoe.config.files import parse_config
from localmoe.core.errors import ConfigError

YAML = Path("site.yaml")
TEXT = """\
# Ours.
profile: 'low_latency'   # quoted, for no reason

port:   8000
engine:
    max_num_seqs: 0x10     # four columns deep
    tiers: {ram_bytes: 1e9, placement: ["layers.0.*=ram"]}
models:
  - model: mixtral         # the large one
    fallbacks: [small]
  # the small one
  - model: small
"""


def test_all_else_stays_as_it_is() -> None:
    changes = {("port",): 9000, ("engine", "max_num_seqs"): 5, ("dispatch", "max_queued"): 7}
    made = edited(TEXT.encode(), YAML, changes).decode()
    assert "# quoted, for no reason" in made
    assert "profile: 'low_latency'" in made
    assert "ram_bytes: 1e9" in made
    expected = parse_config(TEXT.encode(), YAML)
    expected["port"] = 9000
    expected["engine"]["max_num_seqs"] = 5
    expected["dispatch"] = {"max_queued": 7}
    assert parse_config(made.encode(), YAML) == expected
    for comment in ("# Ours.", "# four columns deep", "# the large one", "# the small one"):
        assert comment in made


def test_a_value_that_is_replaced_changes_no_other_byte() -> None:
    for names, old, new in (
        (("engine", "max_num_seqs"), "0x10 ", 5),
        (("profile",), "'low_latency'", "balanced"),
        (("engine", "tiers", "ram_bytes"), "1e9", None),
        (("engine", "tiers", "placement"), '["layers.0.*=ram"]', []),
    ):
        made = edited(TEXT.encode(), YAML, {names: new}).decode()
        assert made == TEXT.replace(old, json.dumps(new) + " " * old.count(" "))


@pytest.mark.parametrize("indent", [2, 4])
def test_a_value_that_is_new_changes_no_other_line(indent: int) -> None:
    space = " " * indent
    text = f"models:\n{space}- model: a   # one\n{space}  name: b\n\ndispatch:\n{space}max_queued: 5\n# end\n"
    made = edited(text.encode(), YAML, {("dispatch", "max_attempts"): 3}).decode()
    assert made.splitlines() == [
        *text.splitlines()[:-1],
        f"{space}max_attempts: 3",
        "# end",
    ] or made.splitlines() == [
        *text.splitlines(),
        f"{space}max_attempts: 3",
    ]


def test_an_empty_file_and_json() -> None:
    assert parse_config(edited(b"# nothing yet\n", YAML, {("port",): 1}), YAML) == {"port": 1}
    path = Path("site.json")
    made = edited(b'{"port": 1, "engine": {"max_num_seqs": 2}}', path, {("engine", "block_tokens"): 32})
    assert parse_config(made, path) == {"port": 1, "engine": {"max_num_seqs": 2, "block_tokens": 32}}


def test_a_block_without_anything_in_it_gets_something() -> None:
    made = edited(b"engine:\n  # max_num_seqs: 3\nport: 1\n", YAML, {("engine", "max_num_seqs"): 4})
    assert parse_config(made, YAML) == {"engine": {"max_num_seqs": 4}, "port": 1}


@given(
    value=st.recursive(
        st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats(-1e9, 1e9) | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
        ),
        max_leaves=6,
    )
)
def test_what_is_read_back_is_what_was_written(value: object) -> None:
    """Or it is refused: texts that only one version of YAML takes for something else."""
    try:
        made = edited(TEXT.encode(), YAML, {("other_engines", "mine"): {"value": value}})
    except ConfigError:
        return
    assert parse_config(made, YAML)["other_engines"]["mine"]["value"] == value


@pytest.mark.parametrize("text", ["yes", "on", "1e9", "012", "1:30", "null", "~", "", " a", "2001-01-01", "# b"])
def test_texts_that_look_like_something_else_stay_texts(text: str) -> None:
    made = edited(b"port: 1\n", YAML, {("host",): text})
    assert parse_config(made, YAML)["host"] == text


def test_a_file_cannot_grow_over_its_bound() -> None:
    with pytest.raises(ConfigError, match="would be larger than"):
        edited(b"port: 1\n", YAML, {("host",): "x" * (1 << 20)})


def test_a_link_stays_a_link_and_permissions_stay(tmp_path: Path) -> None:
    real = tmp_path / "real.yaml"
    real.write_text("a")
    real.chmod(0o640)
    link = tmp_path / "site.yaml"
    link.symlink_to(real)
    write_atomically(link, b"b")
    assert link.is_symlink()
    assert (real.read_bytes(), real.stat().st_mode & 0o777) == (b"b", 0o640)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["real.yaml", "site.yaml"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_stays_its_owners(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("a")
    os.chown(file, 1234, 5678)
    write_atomically(file, b"b")
    stat = file.stat()
    assert (file.read_bytes(), stat.st_uid, stat.st_gid) == (b"b", 1234, 5678)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_a_file_that_is_mounted_by_itself_is_overwritten(tmp_path: Path) -> None:
    source, file = tmp_path / "source.yaml", tmp_path / "mounted" / "site.yaml"
    file.parent.mkdir()
    source.write_text("a long one")
    file.touch()
    if subprocess.run(["mount", "--bind", source, file], check=False, capture_output=True).returncode != 0:
        pytest.skip("mounts are not allowed here")
    try:
        write_atomically(file, b"short")
        assert source.read_bytes() == b"short"
        write_atomically(file, b"a longer one than that")
        assert source.read_bytes() == b"a longer one than that"
        assert [path.name for path in file.parent.iterdir()] == ["site.yaml"]
    finally:
        subprocess.run(["umount", file], check=True)
