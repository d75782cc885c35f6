"""How many processors a process may keep busy."""

import math
import os
from pathlib import Path
from typing import Literal

from localmoe.hardware.control_groups import control_groups


def num_processors(root: Path = Path("/")) -> int:
    """Physical cores that this process may run on, or fewer, at least 1, if a control group's CPU quota allows less.

    Args:
        root: where `proc/` and `sys/` are; tests point it elsewhere.
    """
    count = len({_core(processor, root) for processor in os.sched_getaffinity(0)})
    for version, folder in control_groups("cpu", root):
        count = min(count, math.ceil(_quota(version, folder)))
    return max(count, 1)


def _core(processor: int, root: Path) -> str:
    """The same for all hardware threads of a core; a processor of which nothing is known is a core."""
    siblings = root / f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list"
    return siblings.read_text().strip() if siblings.exists() else str(processor)


def _quota(version: Literal[1, 2], folder: Path) -> float:
    """Processors' worth of time that a group gets; more than any machine has where nothing limits it."""
    names = ["cpu.max"] if version == 2 else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    files = [folder / name for name in names]
    if not all(file.exists() for file in files):
        return 2**31
    quota, period = " ".join(file.read_text() for file in files).split()
    return 2**31 if quota in ("max", "-1") else int(quota) / int(period)
