"""What this process may use of its host, read from trees as both versions of cgroups lay them out."""

from pathlib import Path

import pytest

from fakes.cgroup_trees import HYBRID_MOUNT, V1_UNLIMITED_BYTES, V2_MOUNT, lay, v1_mount
from nodeagent.devices.limits import Cpus, MemoryLimit, cpu_quota, memory_limits, own_cpus, with_threads
from nodeagent.devices.values import DeviceRef

CGROUP = "sys/fs/cgroup"


def v2_tree(root: Path, path: str) -> None:
    lay(root, "proc/self/cgroup", f"0::{path}\n")
    lay(root, "proc/self/mountinfo", V2_MOUNT)


def v1_tree(root: Path, path: str, mount_root: str = "/") -> None:
    lay(root, "proc/self/cgroup", f"5:cpu,cpuacct:{path}\n4:memory:{path}\n1:name=systemd:{path}\n0::/\n")
    mounts = [v1_mount(controllers, mount_root) for controllers in ("cpu,cpuacct", "memory")]
    lay(root, "proc/self/mountinfo", "".join([HYBRID_MOUNT, *mounts]))


def v1_quota(root: Path, path: str, quota: object, period: object = 100000) -> None:
    lay(root, f"{CGROUP}/cpu,cpuacct{path}/cpu.cfs_quota_us", f"{quota}\n")
    lay(root, f"{CGROUP}/cpu,cpuacct{path}/cpu.cfs_period_us", f"{period}\n")


# CPU quotas


@pytest.mark.parametrize(
    ("own", "above", "quota"),
    [
        ("max 100000", "max 100000", None),
        ("350000 100000", "max 100000", 3.5),
        ("400000 100000", "100000 50000", 2.0),
        ("60000 100000", "400000 100000", 0.6),
        ("max 100000", "200000 100000", 2.0),
    ],
)
def test_the_smallest_quota_of_v2_on_the_way_up_counts(
    own: str, above: str, quota: float | None, tmp_path: Path
) -> None:
    v2_tree(tmp_path, "/pod/container")
    lay(tmp_path, f"{CGROUP}/pod/container/cpu.max", f"{own}\n")
    lay(tmp_path, f"{CGROUP}/pod/cpu.max", f"{above}\n")
    lay(tmp_path, f"{CGROUP}/elsewhere/cpu.max", "1000 100000\n")
    assert cpu_quota(tmp_path) == quota


@pytest.mark.parametrize(
    ("own", "above", "quota"), [(-1, -1, None), (60000, -1, 0.6), (-1, 150000, 1.5), (300000, 200000, 2.0)]
)
def test_the_smallest_quota_of_v1_on_the_way_up_counts(
    own: int, above: int, quota: float | None, tmp_path: Path
) -> None:
    v1_tree(tmp_path, "/docker/abc")
    v1_quota(tmp_path, "/docker/abc", own)
    v1_quota(tmp_path, "/docker", above)
    assert cpu_quota(tmp_path) == quota


def test_a_container_that_sees_only_its_own_part_of_the_tree_finds_its_quota(tmp_path: Path) -> None:
    v1_tree(tmp_path, "/docker/abc", mount_root="/docker/abc")
    v1_quota(tmp_path, "", 250000)
    assert cpu_quota(tmp_path) == 2.5


def test_in_a_namespace_of_its_own_a_container_is_at_the_top(tmp_path: Path) -> None:
    v2_tree(tmp_path, "/")
    lay(tmp_path, f"{CGROUP}/cpu.max", "150000 100000\n")
    assert cpu_quota(tmp_path) == 1.5


def test_a_mount_point_with_a_space_is_found(tmp_path: Path) -> None:
    lay(tmp_path, "proc/self/cgroup", "0::/\n")
    lay(tmp_path, "proc/self/mountinfo", V2_MOUNT.replace("/sys/fs/cgroup", "/my\\040groups"))
    lay(tmp_path, "my groups/cpu.max", "100000 100000\n")
    assert cpu_quota(tmp_path) == 1.0


GARBAGE = [
    "",
    "\n",
    "max",
    "nonsense 100000",
    "100000 nonsense",
    "100000 0",
    "0 100000",
    "-5 100000",
    "9" * 5000 + " 1",
]


@pytest.mark.parametrize("text", [*GARBAGE, "\0", "² 1"])
def test_a_quota_that_is_none_is_no_limit(text: str, tmp_path: Path) -> None:
    v2_tree(tmp_path, "/a")
    lay(tmp_path, f"{CGROUP}/a/cpu.max", text)
    assert cpu_quota(tmp_path) is None


@pytest.mark.parametrize("cgroup", ["", "nonsense", "0::/../..\n", "0::/a\0b\n", "0::/gone\n", ":::\n", "1:cpu:/a\n"])
@pytest.mark.parametrize("mountinfo", ["", "nonsense - cgroup2\n", V2_MOUNT, v1_mount("cpu"), " - \n"])
def test_a_process_without_control_groups_has_no_limits(cgroup: str, mountinfo: str, tmp_path: Path) -> None:
    lay(tmp_path, "proc/self/cgroup", cgroup)
    lay(tmp_path, "proc/self/mountinfo", mountinfo)
    assert cpu_quota(tmp_path) is None
    assert memory_limits(tmp_path) == []
    assert own_cpus(tmp_path).usable >= 1


def test_files_that_can_not_be_read_are_no_limits(tmp_path: Path) -> None:
    v2_tree(tmp_path, "/a")
    for name in ("cpu.max", "memory.max"):
        (tmp_path / CGROUP / "a" / name).mkdir(parents=True)  # not even root can read a folder as a file
    assert cpu_quota(tmp_path) is None
    assert memory_limits(tmp_path) == []
    assert cpu_quota(tmp_path / "absent") is None


# What follows for the threads


def cpus(*, host: int = 64, cores: int | None = 32, allowed: int = 64, quota: float | None = None) -> Cpus:
    return Cpus(host, cores, allowed, quota)


@pytest.mark.parametrize(
    ("limits", "usable", "text"),
    [
        (cpus(), 64, "64 of 64 CPUs"),
        (cpus(quota=64), 64, "64 of 64 CPUs"),
        (cpus(quota=3.5), 4, "4 of 64 CPUs: cgroup quota 3.5"),
        (cpus(quota=0.6), 1, "1 of 64 CPUs: cgroup quota 0.6"),
        (cpus(quota=0.0001), 1, "1 of 64 CPUs: cgroup quota 0.0001"),
        (cpus(allowed=8), 8, "8 of 64 CPUs: affinity 8"),
        (cpus(allowed=8, quota=2), 2, "2 of 64 CPUs: cgroup quota 2, affinity 8"),
    ],
)
def test_the_usable_cpus_are_the_smaller_of_affinity_and_quota_rounded_up(limits: Cpus, usable: int, text: str) -> None:
    assert limits.usable == usable
    assert str(limits) == text


def device(index: int = 0, *, threads: int | None = None, pinned: int = 0) -> DeviceRef:
    own = frozenset(range(pinned)) or None
    return DeviceRef(device_id=f"cpu:{index}", backend="cpu", index=index, name="CPU", threads=threads, cpus=own)


@pytest.mark.parametrize(
    ("limits", "devices", "threads"),
    [
        pytest.param(cpus(), [device()], [None], id="no limit: the server decides"),
        pytest.param(cpus(quota=3.5), [device()], [4], id="a quota, rounded up"),
        pytest.param(cpus(quota=0.6), [device(), device(1)], [1, 1], id="at least one"),
        pytest.param(cpus(allowed=8), [device()], [8], id="affinity"),
        pytest.param(cpus(quota=6), [device(), device(1), device(2), device(3)], [2, 2, 2, 2], id="shared evenly"),
        pytest.param(cpus(allowed=48), [device()], [32], id="no more than there are cores"),
        pytest.param(cpus(cores=None, allowed=48), [device()], [48], id="cores unknown"),
        pytest.param(cpus(quota=4), [device(threads=7)], [7], id="configured threads stay"),
        pytest.param(cpus(quota=4), [device(pinned=3), device(1, pinned=1)], [2, 1], id="own CPUs, smaller quota"),
        pytest.param(cpus(allowed=8), [device(pinned=5), device(1, pinned=3)], [5, 3], id="own CPUs, no quota"),
    ],
)
def test_each_device_gets_its_part_of_the_usable_cpus(
    limits: Cpus, devices: list[DeviceRef], threads: list[int | None]
) -> None:
    assert [it.threads for it in with_threads(devices, limits)] == threads


# Memory


def v2_memory(root: Path, path: str, *, limit: object, used: object, cached: int = 0, high: object = "max") -> None:
    files = {"memory.max": limit, "memory.high": high, "memory.current": used}
    for name, value in files.items():
        lay(root, f"{CGROUP}{path}/{name}", f"{value}\n")
    stat = f"anon 5\nfile {cached + 7}\nshmem 7\nactive_file {cached - 1}\ninactive_file 1\nunevictable 7\n"
    lay(root, f"{CGROUP}{path}/memory.stat", stat)


def test_each_limit_of_v2_counts_and_the_page_cache_is_free(tmp_path: Path) -> None:
    v2_tree(tmp_path, "/pod/container")
    v2_memory(tmp_path, "/pod/container", limit=1000, used=700, cached=500)
    v2_memory(tmp_path, "/pod", limit="max", used=900, cached=600)
    v2_memory(tmp_path, "", limit=3000, used=2900, cached=100)
    assert memory_limits(tmp_path) == [MemoryLimit(1000, 800), MemoryLimit(3000, 200)]


def test_a_group_is_throttled_above_its_high_mark_so_that_is_its_limit(tmp_path: Path) -> None:
    v2_tree(tmp_path, "/a")
    v2_memory(tmp_path, "/a", limit=1000, high=800, used=500, cached=100)
    assert memory_limits(tmp_path) == [MemoryLimit(800, 400)]


def test_a_limit_of_v1_counts_with_the_page_cache_of_the_groups_below(tmp_path: Path) -> None:
    v1_tree(tmp_path, "/docker/abc")
    for path, limit, used in (("/docker/abc", 1000, 900), ("/docker", V1_UNLIMITED_BYTES, 5000)):
        lay(tmp_path, f"{CGROUP}/memory{path}/memory.limit_in_bytes", f"{limit}\n")
        lay(tmp_path, f"{CGROUP}/memory{path}/memory.usage_in_bytes", f"{used}\n")
        stat = "active_file 1\ninactive_file 2\ntotal_active_file 300\ntotal_inactive_file 200\n"
        lay(tmp_path, f"{CGROUP}/memory{path}/memory.stat", stat)
    assert memory_limits(tmp_path) == [MemoryLimit(1000, 600)]


@pytest.mark.parametrize(
    ("used", "stat", "available"),
    [
        ("garbage", "active_file 1\n", None),
        ("9000", "active_file nonsense\n", 0),
        ("700", "", 300),
        ("700", "active_file 900\ninactive_file 900\n", 1000),
    ],
)
def test_a_usage_that_makes_no_sense_is_unknown_or_within_the_limit(
    used: str, stat: str, available: int | None, tmp_path: Path
) -> None:
    v2_tree(tmp_path, "/a")
    for name, text in (("memory.max", "1000"), ("memory.current", used), ("memory.stat", stat)):
        lay(tmp_path, f"{CGROUP}/a/{name}", text)
    assert memory_limits(tmp_path) == [MemoryLimit(1000, available)]
