"""The host's CPUs as devices."""

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from fakes.cgroup_trees import V2_MOUNT, lay
from fakes.declared import Declared
from nodeagent.config import DeviceConfig
from nodeagent.devices.cpu import CpuBackend, CpuTimes, Memory, cpu_name, host_times, own_memory
from nodeagent.devices.values import DeviceMetrics
from nodeagent.errors import ConfigError

GIB = 1 << 30


def played(*readings: list[CpuTimes]) -> Callable[[], list[CpuTimes]]:
    remaining = iter(readings)
    return lambda: next(remaining)


def backend_of(*readings: list[CpuTimes]) -> CpuBackend:
    return CpuBackend(times=played(*readings), memory=lambda: Memory(total=16 * GIB, available=10 * GIB))


def test_by_default_the_host_is_one_device() -> None:
    backend = CpuBackend()
    (device,) = backend.devices([])
    assert backend.discover() == [device]
    assert (device.device_id, device.backend, device.index, device.uuid) == ("cpu:0", "cpu", 0, None)
    assert device.memory_total_bytes == own_memory().total <= psutil.virtual_memory().total
    assert device.name
    assert (device.threads, device.cpus) == (None, None)


def test_any_number_of_devices_may_be_declared_each_with_threads_and_cpus() -> None:
    declared = [Declared("cpu:3", threads=2, cpus=frozenset({2, 3})), Declared("cpu:1", threads=4)]
    third, first = CpuBackend().devices(declared)
    assert (third.device_id, third.index, third.threads, third.cpus) == ("cpu:3", 3, 2, frozenset({2, 3}))
    assert (first.device_id, first.index, first.threads, first.cpus) == ("cpu:1", 1, 4, None)


def test_an_entry_of_the_configuration_is_a_declared_device() -> None:
    (device,) = CpuBackend().devices([DeviceConfig.model_validate({"device_id": "cpu:0", "threads": 2, "cpus": [1]})])
    assert (device.threads, device.cpus) == (2, frozenset({1}))


def test_every_declared_device_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ConfigError) as caught:
        CpuBackend().devices([Declared("cpu:1"), Declared("gpu:0"), Declared("cpu:x")])
    assert [str(problem) for problem in caught.value.problems] == [
        "devices[1].device_id: the backend cpu has no 'gpu:0' here; it has cpu:0, cpu:1",
        "devices[2].device_id: the backend cpu has no 'cpu:x' here; it has cpu:0, cpu:1",
    ]


def test_free_memory_is_what_can_be_used_without_swapping() -> None:
    backend = backend_of([CpuTimes(0, 0)])
    (device,) = backend.discover()
    assert backend.read(device, 12.5) == DeviceMetrics(
        measured_at=12.5,
        memory_total_bytes=16 * GIB,
        memory_used_bytes=6 * GIB,
        memory_free_bytes=10 * GIB,
        utilization_ratio=None,
    )


def test_memory_is_the_hosts_or_less_where_a_control_group_limits_the_process(tmp_path: Path) -> None:
    def host() -> Memory:
        return Memory(total=64 * GIB, available=3 * GIB)

    def limited(limit: int, used: int) -> Memory:
        for name, value in (("memory.max", limit), ("memory.current", used)):
            lay(tmp_path, f"sys/fs/cgroup/a/{name}", f"{value}\n")
        return own_memory(host, tmp_path)

    assert own_memory(host, tmp_path) == host()
    lay(tmp_path, "proc/self/cgroup", "0::/a\n")
    lay(tmp_path, "proc/self/mountinfo", V2_MOUNT)
    assert limited(8 * GIB, 7 * GIB) == Memory(8 * GIB, GIB)
    assert limited(8 * GIB, GIB) == Memory(8 * GIB, 3 * GIB)
    assert limited(128 * GIB, GIB) == host()


def test_the_utilization_is_the_mean_since_the_last_reading_over_all_cpus() -> None:
    backend = backend_of(
        [CpuTimes(100, 1000), CpuTimes(500, 1000)],
        [CpuTimes(101, 1002), CpuTimes(502, 1002)],
        [CpuTimes(101, 1004), CpuTimes(502, 1004)],
    )
    (device,) = backend.discover()
    assert [backend.read(device, now).utilization_ratio for now in (0, 2, 4)] == [None, 0.75, 0.0]


def test_each_device_is_measured_over_its_own_cpus_only() -> None:
    before = [CpuTimes(0, 0), CpuTimes(0, 0), CpuTimes(0, 0)]
    after = [CpuTimes(10, 10), CpuTimes(0, 10), CpuTimes(5, 10)]
    backend = backend_of(before, before, after, after)
    one, two = backend.devices([Declared("cpu:0", cpus=frozenset({0})), Declared("cpu:1", cpus=frozenset({1, 2}))])
    assert [backend.read(device, 0).utilization_ratio for device in (one, two)] == [None, None]
    assert [backend.read(device, 1).utilization_ratio for device in (one, two)] == [1.0, 0.25]


def test_counters_that_do_not_change_or_decrease_give_a_valid_utilization() -> None:
    backend = backend_of([CpuTimes(10, 20)], [CpuTimes(10, 20)], [CpuTimes(9, 21)], [CpuTimes(20, 22)])
    (device,) = backend.discover()
    assert [backend.read(device, now).utilization_ratio for now in range(4)] == [None, None, 0.0, 1.0]


def test_a_busy_cpu_has_a_utilization_above_zero() -> None:
    backend = CpuBackend()
    (device,) = backend.discover()
    backend.read(device, 0.0)
    started = host_times()
    while sum(now.total - was.total for now, was in zip(host_times(), started, strict=True)) < 0.2:
        sum(range(10_000))
    ratio = backend.read(device, 1.0).utilization_ratio
    assert ratio is not None
    assert 0 < ratio <= 1


@pytest.mark.real
def test_the_name_of_a_cpu_is_its_model_name_or_else_its_architecture(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    # Linux on x86, and on arm64, which has no model name.
    cpuinfo.write_text("processor\t: 0\nvendor_id\t: AuthenticAMD\nmodel name\t: AMD EPYC 7B12\nflags\t\t: fpu vme\n")
    assert cpu_name(cpuinfo) == "AMD EPYC 7B12"
    cpuinfo.write_text("processor\t: 0\nBogoMIPS\t: 50.00\nCPU implementer\t: 0x41\n")
    assert cpu_name(cpuinfo)
    assert cpu_name(tmp_path / "absent")


def test_a_child_is_kept_off_the_gpus() -> None:
    backend = CpuBackend()
    (device,) = backend.discover()
    assert backend.child_args(device) == ["--device", "none"]
    hidden = backend.child_env(device)
    assert hidden["CUDA_VISIBLE_DEVICES"] == ""
    assert hidden["VK_LOADER_DRIVERS_DISABLE"] == "*"
