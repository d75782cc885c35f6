"""What disk a path lies on."""

import os
from dataclasses import dataclass
from pathlib import Path

from localmoe.hardware.pcie import PcieLink, pcie_link


@dataclass(frozen=True, kw_only=True)
class Disk:
    name: str
    """As the kernel calls it: nvme0n1."""
    link: PcieLink | None
    """None: not on PCI Express, or nobody says."""


def disk_of(path: Path, root: Path = Path("/")) -> Disk | None:
    """The disk of a file or directory; None where no single disk is behind it, as in a container's overlay.

    Args:
        root: where `sys/` is; tests point it elsewhere.
    """
    device = path.stat().st_dev
    block = root / f"sys/dev/block/{os.major(device)}:{os.minor(device)}"
    if not block.exists():
        return None
    folder = block.resolve()
    if (folder / "partition").exists():
        folder = folder.parent
    return Disk(name=folder.name, link=pcie_link(folder))
