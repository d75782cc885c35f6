"""Available memory under every kind of limit."""

from pathlib import Path

import pytest

from localmoe.hardware.memory import available_memory_bytes

MEMINFO = "MemTotal:       2048 kB\nMemAvailable:   1000 kB\n"


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, "proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected_bytes"),
    [
        ("0::/\n", {}, 1000 * 1024),
        ("0::/a\n", {"sys/fs/cgroup/a/memory.max": "max", "sys/fs/cgroup/a/memory.current": "5"}, 1000 * 1024),
        ("0::/a\n", {"sys/fs/cgroup/a/memory.max": "5000\n", "sys/fs/cgroup/a/memory.current": "1000\n"}, 4000),
        ("0::/a/b\n", {"sys/fs/cgroup/a/memory.max": "5000", "sys/fs/cgroup/a/memory.current": "6000"}, 0),
        (
            "5:cpu:/x\n3:memory:/j\n",
            {
                "sys/fs/cgroup/memory/j/memory.limit_in_bytes": "9000",
                "sys/fs/cgroup/memory/j/memory.usage_in_bytes": "1000",
            },
            8000,
        ),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected_bytes: int
) -> None:
    assert available_memory_bytes(machine(tmp_path, cgroup, files)) == expected_bytes


def test_this_machine_has_some() -> None:
    assert available_memory_bytes() > 0
