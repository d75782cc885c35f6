"""Every launch compiles for GPUs of several generations, down to machine code; none need be here."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

KERNELS = "_choose _down _embed _flash _gate_up _heads _linear _merge_parts _norm _sort _sum"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "formats"), [(80, ["mxfp4", "bf16"]), (90, ["nvfp4", "int8", "f32"])], ids=["8.0", "9.0"]
)
def test_every_kernel_compiles(capability: int, formats: list[str], tmp_path: Path) -> None:
    """In a process of its own, where Triton does not interpret, with an empty cache."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, str(script), str(capability), *formats]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.fullmatch(rf"\d+ compiled: {KERNELS}", done.stdout.splitlines()[-1])
