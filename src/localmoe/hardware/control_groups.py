"""Which control groups hold this process."""

from pathlib import Path
from typing import Literal


def control_groups(controller: str, root: Path) -> list[tuple[Literal[1, 2], Path]]:
    """(version, folder) of this process's group of a controller and of every group around it; some may not exist.

    Args:
        controller: such as `memory` or `cpu`.
        root: where `proc/` and `sys/` are.
    """
    groups: list[tuple[Literal[1, 2], Path]] = []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        version: Literal[1, 2] = 2 if controllers == "" else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if version == 1 else "")
        path = base / group.lstrip("/")
        groups += [(version, folder) for folder in (path, *path.parents) if folder.is_relative_to(base)]
    return groups
