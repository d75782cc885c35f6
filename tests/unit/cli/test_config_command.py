"""`localmoe config`, as a person runs it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from localmoe.cli.main import app
from localmoe.core.errors import LocalMoEError

TEXT = "# ours\nprofile: low_latency\ndispatch:\n  max_queued: 5  # few\n"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in list(os.environ):
        if name.startswith("LOCALMOE_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setenv("LOCALMOE_HOME", str(tmp_path / "home"))
    file = tmp_path / "site.yaml"
    file.write_text(TEXT)
    monkeypatch.setenv("LOCALMOE_CONFIG", str(file))
    return file


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["config", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def output_of(*arguments: str) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def test_show_says_values_and_origins(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCALMOE_PORT", "9000")
    monkeypatch.setenv("LOCALMOE_VLLM", '{"url": "http://a:1", "api_key": "s3cr3t"}')
    rows = {row["setting"]: row for row in output_of("show", "--origin")}
    assert rows["dispatch.max_queued"] | {"setting": ""} == {
        "setting": "",
        "value": 5,
        "origin": f"file {site}",
        "effect": "live",
    }
    assert rows["engine.max_num_seqs"]["origin"] == "profile low_latency"
    assert rows["port"]["origin"] == "environment variable LOCALMOE_PORT"
    assert rows["host"]["origin"] == "default"
    assert rows["vllm.api_key"]["value"] == "***"
    assert output_of("show")["dispatch"]["max_queued"] == 5
    assert "max_queued: 5" in run("show").stdout
    table = run("show", "--origin").stdout
    assert "s3cr3t" not in table
    assert "environment variable LOCALMOE_PORT" in table


def test_show_takes_an_environment(site: Path) -> None:
    site.with_name("site.production.yaml").write_text("dispatch: {max_queued: 6}")
    assert output_of("show", "--env", "production")["dispatch"]["max_queued"] == 6


def test_check_says_notes_and_findings(site: Path) -> None:
    site.write_text(
        "memory_config: {dynamic_batch: true}\nvllm: {model_name: microsoft/DialoGPT-medium, max_model_len: 2048}"
    )
    result = run("check")
    assert result.exit_code == 0
    assert "note: " in result.stdout
    assert "lacking: microsoft/DialoGPT-medium: vllm.max_model_len is 2048, but" in result.stdout
    site.write_text("models: [{model: a, fallbacks: [a]}]")
    assert run("check").exit_code == 1
    assert {finding["kind"] for finding in output_of("check")["findings"]} >= {"error"}
    site.write_text(TEXT)
    assert "nothing to complain about" in run("check").stdout
    site.write_text("prot: 1")
    with pytest.raises(LocalMoEError, match="did you mean 'port'"):
        run("check")


def test_set_history_diff_and_rollback(site: Path) -> None:
    assert run("set", "dispatch.max_queued", "7", "--reason", "more").exit_code == 0
    assert site.read_text() == TEXT.replace("5", "7")
    run("set", "profile", "balanced")
    versions = output_of("history")
    assert [version["number"] for version in versions] == [3, 2, 1]
    assert [version["reason"] for version in versions] == ["", "more", "before a change"]
    assert "dispatch.max_queued" in run("history").stdout
    (change,) = output_of("diff", "1", "2")
    assert change == {"key": "dispatch.max_queued", "before": 5, "after": 7}
    assert {change["key"] for change in output_of("diff", "1")} >= {"profile", "engine.max_num_seqs"}
    assert run("rollback", "1").exit_code == 0
    assert site.read_text() == TEXT
    assert output_of("history")[0]["reason"] == "rollback to version 1"
    assert "they are the same" in run("diff", "1").stdout
    site.write_text(TEXT + "#\n")
    assert "only comments or layout differ" in run("diff", "1").stdout


def test_rollback_loses_nothing_that_was_written_by_hand(site: Path) -> None:
    run("set", "dispatch.max_queued", "7")
    by_hand = TEXT.replace("5", "9")
    site.write_text(by_hand)
    run("rollback", "1")
    assert site.read_text() == TEXT
    assert [version["reason"] for version in output_of("history")][:2] == [
        "rollback to version 1",
        "before a rollback",
    ]
    run("rollback", "3")
    assert site.read_text() == by_hand


def test_rollback_mends_a_broken_file(site: Path) -> None:
    run("set", "dispatch.max_queued", "7")
    site.write_text("dispatch: [")
    run("rollback", "2")
    assert site.read_text() == TEXT.replace("5", "7")
    site.unlink()
    run("rollback", "1")
    assert site.read_text() == TEXT


def test_what_is_wrong_is_said(site: Path) -> None:
    for arguments, said in (
        (("set", "dispatch.max_queue", "7"), "did you mean 'dispatch.max_queued'"),
        (("set", "dispatch.max_queued", "0"), "must be positive"),
        (("rollback", "7"), "the history has no version 7"),
        (("diff", "7"), "the history has no version 7"),
    ):
        with pytest.raises(LocalMoEError, match=said):
            run(*arguments)
        if arguments[0] == "set":
            assert site.read_text() == TEXT


def test_the_schema_is_printed(site: Path) -> None:
    assert json.loads(run("schema").stdout)["properties"]["port"]["maximum"] == 65535
