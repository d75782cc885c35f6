import os
import subprocess
import sys

import pytest
import typer

from localmoe import __version__
from localmoe.cli import main as main_module
from localmoe.core.errors import ModelNotFoundError


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    plain = {**os.environ, "_TYPER_FORCE_DISABLE_TERMINAL": "1"}
    command = [sys.executable, "-m", "localmoe", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=plain)


def run_main(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """`main` with a command line whose only command fails with `error`."""
    app = typer.Typer(pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    monkeypatch.setattr(main_module, "app", app)
    monkeypatch.setattr(sys, "argv", ["localmoe"])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    main_module.main()


def test_version() -> None:
    result = run("--version")
    assert (result.returncode, result.stdout, result.stderr) == (0, f"localmoe {__version__}\n", "")


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.returncode == 0
    for command in ("serve", "chat", "models", "bench", "inspect"):
        assert f" {command} " in result.stdout


def test_the_command_line_loads_nothing_heavy() -> None:
    code = "import sys, localmoe.cli.main; print(*sorted({'torch', 'fastapi', 'numpy'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "\n"


def test_engines_are_started_before_the_gateways_libraries_are_loaded() -> None:
    heavy = "{'torch', 'fastapi', 'uvicorn', 'sqlalchemy', 'redis'}"
    code = f"import sys, localmoe.cli.serving; print(*sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "\n"


def test_wrong_usage_exits_with_2() -> None:
    result = run("chat", "--temperature", "9")
    assert result.returncode == 2
    assert "temperature" in result.stderr
    assert "Traceback" not in result.stderr


def test_our_errors_are_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(monkeypatch, ModelNotFoundError("no model 'x' here"))
    assert exit_.value.code == 1
    assert capsys.readouterr() == ("", "error: no model 'x' here\n")


def test_ctrl_c_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_main(monkeypatch, KeyboardInterrupt())
    assert exit_.value.code == 130


def test_unexpected_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        run_main(monkeypatch, ZeroDivisionError())
