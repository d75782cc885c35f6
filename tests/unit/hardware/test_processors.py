"""How many processors count under every kind of limit."""

import os
from pathlib import Path

import pytest

from localmoe.hardware.processors import num_processors

V1_QUOTA, V1_PERIOD = "sys/fs/cgroup/cpu/{}cpu.cfs_quota_us", "sys/fs/cgroup/cpu/{}cpu.cfs_period_us"


def siblings(*cores: tuple[int, ...]) -> dict[str, str]:
    return {
        f"sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list": ",".join(map(str, core)) + "\n"
        for core in cores
        for processor in core
    }


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        pytest.param("0::/\n", {}, 4, id="nothing is known"),
        pytest.param("0::/\n", siblings((0, 1), (2, 3), (4, 5)), 2, id="siblings side by side"),
        pytest.param("0::/\n", siblings((0, 4), (1, 5), (2, 6), (3, 7)), 4, id="siblings elsewhere"),
        pytest.param("0::/\n", siblings((0, 1)), 3, id="some unreadable"),
        pytest.param("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "max 100000\n"}, 4, id="no quota"),
        pytest.param("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2, id="two"),
        pytest.param("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "210000 100000\n"}, 3, id="rounded up"),
        pytest.param("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "1000 100000\n"}, 1, id="at least one"),
        pytest.param("0::/a\n", {"sys/fs/cgroup/a/cpu.max": "900000 100000\n"}, 4, id="more than there are"),
        pytest.param(
            "0::/a/b\n",
            {"sys/fs/cgroup/a/b/cpu.max": "max 100000\n", "sys/fs/cgroup/a/cpu.max": "100000 100000\n"},
            1,
            id="of a group around it",
        ),
        pytest.param("0::/a\n", {"sys/fs/cgroup/cpu.max": "150000 50000\n"}, 3, id="of the root"),
        pytest.param(
            "5:memory:/x\n4:cpu,cpuacct:/j\n",
            {V1_QUOTA.format("j/"): "250000\n", V1_PERIOD.format("j/"): "100000\n"},
            3,
            id="version 1",
        ),
        pytest.param(
            "4:cpuacct,cpu:/j\n0::/\n",
            {V1_QUOTA.format(""): "-1\n", V1_PERIOD.format(""): "100000\n"},
            4,
            id="version 1 without a quota",
        ),
        pytest.param(
            "4:cpuset:/j\n", {V1_QUOTA.format(""): "1000\n", V1_PERIOD.format(""): "1000\n"}, 4, id="not ours"
        ),
    ],
)
def test_the_tightest_limit_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cgroup: str, files: dict[str, str], expected: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    assert num_processors(machine(tmp_path, cgroup, files)) == expected


def test_this_machine_has_some() -> None:
    assert 1 <= num_processors() <= len(os.sched_getaffinity(0))
