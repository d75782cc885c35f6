"""How much memory a process may still take."""

from pathlib import Path


def available_memory_bytes(root: Path = Path("/")) -> int:
    """What the kernel says is available, less if a control group (v1 or v2) allows less.

    Args:
        root: where `proc/` and `sys/` are; tests point it elsewhere.
    """
    fields = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    for limit_file, usage_file in _control_group_files(root):
        if limit_file.exists() and usage_file.exists():
            limit = limit_file.read_text().strip()
            if limit != "max":
                available = min(available, max(int(limit) - int(usage_file.read_text()), 0))
    return available


def _control_group_files(root: Path) -> list[tuple[Path, Path]]:
    """(limit, usage) of this process's group and of every group around it."""
    pairs: list[tuple[Path, Path]] = []
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif controllers == "memory":
            base, names = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        path = base / group.lstrip("/")
        folders = (folder for folder in (path, *path.parents) if folder.is_relative_to(base))
        pairs += [(folder / names[0], folder / names[1]) for folder in folders]
    return pairs
