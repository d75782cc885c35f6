"""How much memory a process may still take."""

from pathlib import Path
from typing import Literal

from localmoe.hardware.control_groups import control_groups

_FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
"""Limit and usage, by version of control groups."""


def available_memory_bytes(root: Path = Path("/")) -> int:
    """What the kernel says is available, less if a control group (v1 or v2) allows less.

    Args:
        root: where `proc/` and `sys/` are; tests point it elsewhere.
    """
    available = _meminfo_bytes("MemAvailable", root)
    for version, folder in control_groups("memory", root):
        limit_file, usage_file = (folder / name for name in _FILES[version])
        if limit_file.exists() and usage_file.exists():
            limit = limit_file.read_text().strip()
            if limit != "max":
                usage = int(usage_file.read_text()) - _file_pages_bytes(folder, version)
                available = min(available, max(int(limit) - usage, 0))
    return available


def process_memory_bytes(root: Path = Path("/")) -> int:
    """What this process has taken and nobody else could use: not the pages of files.

    Args:
        root: where `proc/` is; tests point it elsewhere.
    """
    fields = dict(line.split(":", 1) for line in (root / "proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def total_memory_bytes(root: Path = Path("/")) -> int:
    """What the machine has, less if a control group (v1 or v2) allows less.

    Args:
        root: where `proc/` and `sys/` are; tests point it elsewhere.
    """
    total = _meminfo_bytes("MemTotal", root)
    for version, folder in control_groups("memory", root):
        limit_file = folder / _FILES[version][0]
        if limit_file.exists() and (limit := limit_file.read_text().strip()) != "max":
            total = min(total, int(limit))
    return total


def _file_pages_bytes(folder: Path, version: Literal[1, 2]) -> int:
    """Pages of files that a group is charged for, which the kernel takes back when it needs them."""
    stat_file = folder / "memory.stat"
    if not stat_file.exists():
        return 0
    prefix = "total_" if version == 1 else ""
    fields = dict(line.split() for line in stat_file.read_text().splitlines())
    return sum(int(fields.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def _meminfo_bytes(field: str, root: Path) -> int:
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    return int(fields[field].split()[0]) * 1024
