"""How much memory a process may still take."""

from pathlib import Path

from localmoe.hardware.control_groups import control_groups

_FILES = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes"), 2: ("memory.max", "memory.current")}
"""Limit and usage, by version of control groups."""


def available_memory_bytes(root: Path = Path("/")) -> int:
    """What the kernel says is available, less if a control group (v1 or v2) allows less.

    Args:
        root: where `proc/` and `sys/` are; tests point it elsewhere.
    """
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for version, folder in control_groups("memory", root):
        limit_file, usage_file = (folder / name for name in _FILES[version])
        if limit_file.exists() and usage_file.exists():
            limit = limit_file.read_text().strip()
            if limit != "max":
                available = min(available, max(int(limit) - int(usage_file.read_text()), 0))
    return available
