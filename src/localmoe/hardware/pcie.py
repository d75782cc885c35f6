"""How fast the PCI Express link of a device may be."""

from dataclasses import dataclass
from pathlib import Path

_8B10B_GT_S = 5.0
"""Links up to this speed (generation 2) carry 8 bits in 10, faster ones 128 in 130."""


@dataclass(frozen=True, kw_only=True)
class PcieLink:
    """What both ends of a link can do; while idle, devices often run it slower."""

    gt_s: float
    """Transfers a second on each lane, in 10^9: 8 in generation 3, 16 in 4, 32 in 5."""
    num_lanes: int

    @property
    def bytes_s(self) -> float:
        """In each direction, before the overhead of packets."""
        return self.gt_s * 1e9 / 8 * self.num_lanes * (8 / 10 if self.gt_s <= _8B10B_GT_S else 128 / 130)


def pcie_link(device: Path) -> PcieLink | None:
    """The link that leads to a device.

    Args:
        device: its folder in sysfs, symbolic links resolved, or that of something on it, as of a disk's partition.

    Returns:
        None where nothing is known: most virtual machines do not say.
    """
    for folder in (device, *device.parents):
        if (folder / "max_link_speed").exists():
            ends = [_link(end) for end in (folder, folder.parent) if (end / "max_link_speed").exists()]
            known = [end for end in ends if end is not None]
            if not known:
                return None
            return PcieLink(
                gt_s=min(end.gt_s for end in known),
                num_lanes=min(end.num_lanes for end in known),
            )
    return None


def _link(device: Path) -> PcieLink | None:
    speed = (device / "max_link_speed").read_text().split()  # as "16.0 GT/s PCIe", or "Unknown"
    lanes = (device / "max_link_width").read_text().strip()
    try:
        link = PcieLink(gt_s=float(speed[0]), num_lanes=int(lanes))
    except (ValueError, IndexError):
        return None
    return link if link.gt_s > 0 and 0 < link.num_lanes <= 32 else None
