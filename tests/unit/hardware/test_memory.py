"""Available memory under every kind of limit."""

import mmap
from pathlib import Path

import pytest

from localmoe.hardware.memory import available_memory_bytes, process_memory_bytes, total_memory_bytes

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
        (
            "3:memory:/j\n",
            {
                "sys/fs/cgroup/memory/j/memory.limit_in_bytes": "9000",
                "sys/fs/cgroup/memory/j/memory.usage_in_bytes": "5000",
                "sys/fs/cgroup/memory/j/memory.stat": "cache 7\ntotal_inactive_file 600\ntotal_active_file 400\n",
            },
            5000,
        ),
        (
            "0::/a\n",
            {
                "sys/fs/cgroup/a/memory.max": "5000",
                "sys/fs/cgroup/a/memory.current": "4000",
                "sys/fs/cgroup/a/memory.stat": "anon 3000\ninactive_file 300\nactive_file 700\n",
            },
            2000,
        ),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected_bytes: int
) -> None:
    assert available_memory_bytes(machine(tmp_path, cgroup, files)) == expected_bytes


def test_this_machine_has_some() -> None:
    assert available_memory_bytes() > 0


def test_what_a_process_takes_grows_with_it() -> None:
    before_bytes = process_memory_bytes()
    # A mapping of its own: the allocator could give memory that the process has already taken.
    with mmap.mmap(-1, 1 << 24, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as taken:
        taken.write(b"x" * len(taken))
        assert process_memory_bytes() - before_bytes > 0.9 * (1 << 24)


@pytest.mark.parametrize(
    ("cgroup", "files", "expected_bytes"),
    [
        ("0::/\n", {}, 2048 * 1024),
        ("0::/a\n", {"sys/fs/cgroup/a/memory.max": "max"}, 2048 * 1024),
        ("0::/a/b\n", {"sys/fs/cgroup/a/memory.max": "5000"}, 5000),
        ("3:memory:/j\n", {"sys/fs/cgroup/memory/j/memory.limit_in_bytes": "9000"}, 9000),
    ],
)
def test_total_is_what_the_tightest_limit_leaves(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected_bytes: int
) -> None:
    assert total_memory_bytes(machine(tmp_path, cgroup, files)) == expected_bytes
