"""Whether the kernel has just killed a process for want of memory, read from trees as cgroup v1 and v2 lay them out."""

from pathlib import Path

import pytest

from supervisor.memory import OomWatch, says_out_of_device_memory, says_out_of_memory

V2_MOUNT = "29 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_MOUNT = "34 28 0:31 {root} /sys/fs/cgroup/memory rw,nosuid shared:9 - cgroup cgroup rw,memory\n"
HYBRID = "42 28 0:39 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n"
EVENTS = "low 0\nhigh 0\nmax 17\noom 3\noom_kill {kills}\noom_group_kill 0\n"
CONTROL = "oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def v2(folder: Path, kills: int, limit: str = "max") -> None:
    write(folder / "memory.events", EVENTS.format(kills=kills))
    write(folder / "memory.max", f"{limit}\n")


def v1(folder: Path, kills: int, limit: int = 9223372036854771712) -> None:
    write(folder / "memory.oom_control", CONTROL.format(kills=kills))
    write(folder / "memory.limit_in_bytes", f"{limit}\n")


def test_a_kill_in_our_cgroup_of_v2_is_noticed_with_the_smallest_limit_above_it(tmp_path: Path) -> None:
    top = tmp_path / "sys/fs/cgroup"
    write(tmp_path / "proc/self/cgroup", "0::/system.slice/agent.service\n")
    write(tmp_path / "proc/self/mountinfo", V2_MOUNT)
    v2(top / "system.slice", 4, "1073741824")
    v2(top / "system.slice/agent.service", 4)
    watch = OomWatch(tmp_path)
    watch.look(1.0)
    assert not watch.just_killed(1.0)
    v2(top / "system.slice/agent.service", 5)
    watch.look(2.0)
    assert watch.just_killed(2.0)
    assert watch.just_killed(11.9)
    assert not watch.just_killed(12.1)
    assert watch.limit() == "limit 1073741824 bytes"


@pytest.mark.parametrize(
    ("root", "path"), [("/", "/docker/abc"), ("/docker/abc", "/docker/abc"), ("/docker", "/docker/abc")]
)
def test_a_kill_in_our_cgroup_of_v1_is_noticed_also_in_a_container_that_sees_only_its_part(
    root: str, path: str, tmp_path: Path
) -> None:
    top = tmp_path / "sys/fs/cgroup/memory"
    write(tmp_path / "proc/self/cgroup", f"5:cpu,cpuacct:/\n4:memory:{path}\n0::/\n")
    write(tmp_path / "proc/self/mountinfo", HYBRID + V1_MOUNT.format(root=root))
    own = top / path.removeprefix(root.rstrip("/")).lstrip("/")
    v1(top, 0)
    v1(own, 0, 536870912)
    watch = OomWatch(tmp_path)
    v1(own, 1, 536870912)
    watch.look(1.0)
    assert watch.just_killed(1.0)
    assert watch.limit() == "limit 536870912 bytes"


def test_without_a_limit_it_was_the_host_that_ran_out(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/a\n")
    write(tmp_path / "proc/self/mountinfo", V2_MOUNT)
    v2(tmp_path / "sys/fs/cgroup/a", 0)
    assert OomWatch(tmp_path).limit() == "all of this host's"


def test_a_count_that_can_not_be_read_for_a_moment_is_no_rise(tmp_path: Path) -> None:
    events = tmp_path / "sys/fs/cgroup/a/memory.events"
    write(tmp_path / "proc/self/cgroup", "0::/a\n")
    write(tmp_path / "proc/self/mountinfo", V2_MOUNT)
    v2(events.parent, 7)
    watch = OomWatch(tmp_path)
    events.unlink()
    watch.look(1.0)
    v2(events.parent, 7)
    watch.look(2.0)
    assert not watch.just_killed(2.0)
    v2(events.parent, 8)
    watch.look(3.0)
    assert watch.just_killed(3.0)


@pytest.mark.parametrize(
    ("cgroup", "mountinfo"),
    [("", ""), ("nonsense\n", "nonsense\n"), ("0::/a\n", V2_MOUNT), ("0::/../..\n", V2_MOUNT), ("4:memory:/a\n", "")],
)
def test_without_counters_no_kill_is_noticed(cgroup: str, mountinfo: str, tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", cgroup)
    write(tmp_path / "proc/self/mountinfo", mountinfo)
    watch = OomWatch(tmp_path)
    watch.look(1.0)
    assert not watch.just_killed(1.0)


@pytest.mark.parametrize("line", ["CUDA error: Out Of Memory", "bash: fork: Cannot allocate memory"])
def test_a_line_that_says_so_is_recognized(line: str) -> None:
    assert says_out_of_memory(["fine", line])
    assert not says_out_of_memory(["fine", "loaded into memory"])


@pytest.mark.parametrize(
    "line",
    [
        "alloc_buffer: allocating 40960.00 MiB on device 0: cudaMalloc failed: out of memory",
        "ggml_vulkan: vk::Device::allocateMemory: ErrorOutOfDeviceMemory",
        "ggml_vulkan: Device memory allocation of size 1073741824 failed.",
        "alloc_tensor_range: failed to allocate ROCm0 buffer of size 42949672960",
        "llama_model_load: error loading model: unable to allocate Vulkan0 buffer",
        "ggml_gallocr_reserve_n: failed to allocate CUDA0 buffer of size 319029248",
        "CUDA error: out of memory",
        "ggml_metal_buffer_init: error: failed to allocate buffer, size = 4096.00 MiB",
        "alloc: can't allocate 4294967296 Bytes of memory on device",
    ],
)
def test_a_line_about_a_devices_memory_is_told_from_one_about_the_hosts(line: str) -> None:
    assert says_out_of_device_memory(["fine", line])
    for other in (
        "alloc_tensor_range: failed to allocate CPU buffer of size 1",
        "failed to allocate CPU_REPACK buffer of size 1",
        "failed to allocate CUDA_Host buffer of size 1",
        "failed to allocate compute buffers",
        "failed to allocate buffer for kv cache",
        "std::bad_alloc",
        "loaded onto the device",
    ):
        assert not says_out_of_device_memory([other])
