"""`localmoe serve` up to the point where it looks for the model."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TUNING = """
memory_config: {expert_threshold: 0.2, prefetch_layers: 2}
compute_config: {auto_tune: true}
"""


def serve(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LOCALMOE_")}
    kept |= {"LOCALMOE_HOME": str(home), "_TYPER_FORCE_DISABLE_TERMINAL": "1", **environment}
    command = [sys.executable, "-m", "localmoe", "serve", "no-such-model", "--port", "0", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=kept)


def test_it_says_what_became_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "tuning.yaml"
    file.write_text(TUNING)
    by_flag, by_environment = serve(tmp_path, "--config", str(file)), serve(tmp_path, LOCALMOE_CONFIG=str(file))
    *notes, last = by_flag.stderr.splitlines()
    assert [note.split(": ")[:3] for note in notes] == [
        ["note", str(file), key]
        for key in ("memory_config.expert_threshold", "memory_config.prefetch_layers", "compute_config.auto_tune")
    ]
    assert last.startswith("error: ")
    assert "no-such-model" in last
    assert by_environment.stderr == by_flag.stderr


def test_a_bad_file_or_profile_ends_it_in_a_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("engine: {max_num_sequences: 3}")
    result = serve(tmp_path, "--config", str(file))
    assert result.returncode == 1
    assert result.stderr == (
        f"error: {file}: 'engine.max_num_sequences' is not a setting; did you mean 'engine.max_num_seqs'?\n"
    )
    result = serve(tmp_path, "--profile", "fast")
    assert result.returncode == 2
    assert "small_memory" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_flag_goes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text("profile: fast")
    assert "'profile' (file" in serve(tmp_path, "--config", str(file)).stderr
    assert "no-such-model" in serve(tmp_path, "--config", str(file), "--profile", "balanced").stderr


def test_a_device_that_is_none_ends_it_in_a_line(tmp_path: Path) -> None:
    result = serve(tmp_path, "--device", "gpu")
    assert result.returncode == 1
    said = "device is 'gpu'; it must be auto, cpu, cuda, or cuda:0 and so on"
    assert result.stderr == f"error: setting 'engine.device' (--device): {said}\n"


def test_a_trace_whose_path_is_not_utf8_ends_it_in_a_line(tmp_path: Path) -> None:
    result = serve(tmp_path, "--routing-trace", "\udcff.gz")
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: setting 'engine.routing_trace' (--routing-trace): ")


def test_what_cannot_be_listened_on_is_what_is_advised_about(tmp_path: Path) -> None:
    for host in ("999.1.1.1", "a..b"):
        stderr = serve(tmp_path, "--host", host).stderr
        assert stderr.startswith(f"error: cannot listen on {host} port 0: ")
        assert stderr.endswith("; choose another --host\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert serve(tmp_path, "--port", str(port)).stderr.endswith("; choose another --port\n")
