"""NVIDIA GPUs through the library NVML, with a fake of it."""

import logging
import threading
from pathlib import Path

import pynvml
import pytest
import trio

from fakes.cgroup_trees import lay
from fakes.declared import Declared
from fakes.nvml import GIB, MIG, UUIDS, FakeGpu, FakeNvml, Memory
from nodeagent.devices.backend import DriverError
from nodeagent.devices.cuda import CudaBackend
from nodeagent.devices.nvml_driver import NvmlDriver
from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.errors import ConfigError, StartupError


def three_gpus() -> FakeNvml:
    return FakeNvml(gpus=[FakeGpu(uuid=uuid) for uuid in UUIDS])


def backend_on(nvml: FakeNvml, mask: str | None = None) -> CudaBackend:
    return CudaBackend(NvmlDriver(nvml), {} if mask is None else {"CUDA_VISIBLE_DEVICES": mask})


def seen(mask: str | None, nvml: FakeNvml | None = None) -> list[str]:
    return [device.device_id for device in backend_on(nvml or three_gpus(), mask).discover()]


def test_every_gpu_is_a_device_by_its_number_and_uuid() -> None:
    assert backend_on(three_gpus()).discover() == [
        DeviceRef(
            device_id=f"gpu:{index}",
            backend="cuda",
            index=index,
            name="NVIDIA L4",
            uuid=uuid,
            memory_total_bytes=24 * GIB,
        )
        for index, uuid in enumerate(UUIDS)
    ]


@pytest.mark.parametrize(
    ("mask", "devices"),
    [
        (None, ["gpu:0", "gpu:1", "gpu:2"]),
        ("", []),
        ("1", ["gpu:1"]),
        ("2,0", ["gpu:2", "gpu:0"]),
        (" 2 , 0 ", ["gpu:2", "gpu:0"]),
        # The first invalid entry hides itself and the rest. The first of these is NVIDIA's own example.
        ("0,2,-1,1", ["gpu:0", "gpu:2"]),
        ("-1", []),
        ("0,3,1", ["gpu:0"]),
        ("0,,1", ["gpu:0"]),
        ("NoDevFiles", []),
        (UUIDS[1], ["gpu:1"]),
        (f"{UUIDS[2]},{UUIDS[0]}", ["gpu:2", "gpu:0"]),
        ("GPU-c7b5", ["gpu:0"]),
        ("GPU-d6d", ["gpu:1"]),
        ("GPU-d6", []),
        ("GPU-ffff", []),
        # A device that is named twice makes the whole mask invalid.
        ("0,0", []),
        ("1,2,1", []),
        ("MIG-unknown", []),
    ],
)
def test_the_mask_in_the_agents_environment_applies(mask: str | None, devices: list[str]) -> None:
    assert seen(mask) == devices


def test_a_child_sees_only_its_own_gpu_whatever_the_mask_of_the_agent() -> None:
    backend = backend_on(three_gpus(), "2,1")
    first, second = backend.discover()
    hidden = dict.fromkeys(("GGML_VK_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"), "")
    hidden["VK_LOADER_DRIVERS_DISABLE"] = "*"
    order = {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    assert backend.child_env(first) == {**hidden, **order, "CUDA_VISIBLE_DEVICES": UUIDS[2]}
    assert backend.child_env(second) == {**hidden, **order, "CUDA_VISIBLE_DEVICES": UUIDS[1]}
    assert backend.child_args(first) == []


def test_slices_of_gpus_in_the_mask_are_devices() -> None:
    nvml = three_gpus()
    slice_ = FakeGpu(
        uuid=MIG,
        name="NVIDIA A100 MIG 1g.5gb",
        memory=Memory(5 * GIB, GIB),
        utilization=None,
        temperature=None,
        milliwatts=None,
    )
    nvml.slices.append(slice_)
    backend = backend_on(nvml, MIG)
    (device,) = backend.discover()
    assert (device.device_id, device.uuid, device.name) == ("gpu:0", MIG, "NVIDIA A100 MIG 1g.5gb")
    assert backend.child_env(device)["CUDA_VISIBLE_DEVICES"] == MIG
    assert backend.read(device, 1.0) == DeviceMetrics(
        measured_at=1.0, memory_total_bytes=5 * GIB, memory_used_bytes=GIB, memory_free_bytes=4 * GIB
    )
    assert seen(f"{MIG},{MIG}", nvml) == []


def test_a_reading_has_sizes_in_bytes_and_a_utilization_from_0_to_1() -> None:
    backend = backend_on(three_gpus())
    assert backend.read(backend.discover()[1], 7.0) == DeviceMetrics(
        measured_at=7.0,
        memory_total_bytes=24 * GIB,
        memory_used_bytes=1 * GIB,
        memory_free_bytes=23 * GIB,
        utilization_ratio=0.37,
        temperature_celsius=41.0,
        power_watts=16.54,
    )


def test_a_value_that_a_gpu_does_not_have_is_unknown_and_no_error(caplog: pytest.LogCaptureFixture) -> None:
    # A GPU that shares the host's memory: its NVML answers "Not Supported".
    backend = backend_on(
        FakeNvml(gpus=[FakeGpu(uuid=UUIDS[0], name="NVIDIA GB10", memory=None, utilization=0, milliwatts=None)])
    )
    (device,) = backend.discover()
    assert device.memory_total_bytes is None
    assert backend.read(device, 1.0) == DeviceMetrics(measured_at=1.0, utilization_ratio=0.0, temperature_celsius=41.0)
    assert caplog.records == []


def test_a_driver_that_is_unloaded_leaves_the_metrics_unknown_with_one_warning_and_is_used_again_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    nvml = three_gpus()
    backend = backend_on(nvml)
    device = backend.discover()[0]
    nvml.error = pynvml.NVML_ERROR_DRIVER_NOT_LOADED
    assert [backend.read(device, now) for now in (1.0, 2.0)] == [
        DeviceMetrics(measured_at=1.0),
        DeviceMetrics(measured_at=2.0),
    ]
    nvml.error = pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH
    assert backend.read(device, 3.0) == DeviceMetrics(measured_at=3.0)
    nvml.error = None
    assert backend.read(device, 4.0).memory_total_bytes == 24 * GIB
    assert backend.read(device, 5.0).memory_total_bytes == 24 * GIB
    assert [record.getMessage() for record in caplog.records] == [
        "gpu:0 can't be measured: NVML: Driver Not Loaded",
        "gpu:0 can't be measured: NVML: RM has detected an NVML/RM version mismatch.",
        "gpu:0 can be measured again",
    ]
    assert nvml.initialised == 1


def test_a_gpu_that_is_lost_does_not_affect_the_others(caplog: pytest.LogCaptureFixture) -> None:
    nvml = three_gpus()
    backend = backend_on(nvml)
    first, second, third = backend.discover()
    nvml.gpus[1].error = pynvml.NVML_ERROR_GPU_IS_LOST
    assert backend.read(second, 1.0) == DeviceMetrics(measured_at=1.0)
    assert [backend.read(device, 1.0).utilization_ratio for device in (first, third)] == [0.37, 0.37]
    assert seen(None, nvml) == ["gpu:0", "gpu:2"]
    assert "GPU 1 is ignored: NVML: GPU is lost" in caplog.text


def test_close_shuts_the_library_down() -> None:
    nvml = three_gpus()
    backend = backend_on(nvml)
    backend.discover()
    backend.close()
    assert nvml.initialised == 0
    assert (nvml.calls["init"], nvml.calls["shutdown"]) == (1, 1)


def test_a_library_that_fails_to_shut_down_is_only_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    nvml = three_gpus()
    backend = backend_on(nvml)
    nvml.initialised = 0  # someone else shut it down
    backend.close()
    assert caplog.messages == ["NVML could not be shut down: Uninitialized"]
    backend.close()
    assert nvml.calls["shutdown"] == 1


def test_a_gpu_without_a_uuid_is_read_by_its_number() -> None:
    assert NvmlDriver(three_gpus()).read(None, 2, 1.0).utilization_ratio == 0.37


def test_a_gpu_that_fails_while_it_is_read_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    class LosesGpu(FakeNvml):
        def nvmlDeviceGetTemperature(self, handle: object, sensor: int, /) -> int:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_GPU_IS_LOST)

    backend = backend_on(LosesGpu(gpus=[FakeGpu(uuid=UUIDS[0])]))
    (device,) = backend.discover()
    assert backend.read(device, 1.0) == DeviceMetrics(measured_at=1.0)
    assert caplog.messages == ["gpu:0 can't be measured: NVML: GPU is lost"]


def test_a_gpu_that_sleeps_is_not_asked(tmp_path: Path) -> None:
    nvml = FakeNvml(gpus=[FakeGpu(uuid=UUIDS[0], bus_id="00000000:01:00.0", utilization=0, memory=Memory(GIB, 0))])
    backend = CudaBackend(NvmlDriver(nvml), {}, root=tmp_path)
    (device,) = backend.discover()
    power = "sys/bus/pci/devices/0000:01:00.0/power"
    lay(tmp_path, f"{power}/control", "auto\n")
    lay(tmp_path, f"{power}/runtime_status", "suspended\n")
    assert backend.read(device, 1.0) == DeviceMetrics(measured_at=1.0)
    lay(tmp_path, f"{power}/runtime_status", "active\n")
    assert [backend.read(device, now).measured_at for now in (2.0, 4.0, 62.0, 64.0)] == [2.0, 2.0, 62.0, 62.0]
    nvml.gpus[0].utilization = 90
    assert [backend.read(device, now).measured_at for now in (122.0, 124.0)] == [122.0, 124.0]
    lay(tmp_path, f"{power}/control", "on\n")
    nvml.gpus[0].utilization = 0
    assert [backend.read(device, now).measured_at for now in (126.0, 128.0)] == [126.0, 128.0]


async def test_closing_does_not_wait_for_a_driver_that_hangs() -> None:
    asked, answer = threading.Event(), threading.Event()

    class HangingNvml(FakeNvml):
        def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> FakeGpu:
            asked.set()
            assert answer.wait(30)
            return super().nvmlDeviceGetHandleByUUID(uuid)

    nvml = HangingNvml(gpus=[FakeGpu(uuid=UUIDS[0])])
    backend = backend_on(nvml)
    (device,) = backend.discover()
    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, backend.read, device, 1.0)
            await trio.to_thread.run_sync(asked.wait)
            backend.close()
            assert nvml.calls["shutdown"] == 0
            answer.set()


@pytest.mark.parametrize("error", [pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED])
def test_an_absent_driver_is_distinguished_from_a_broken_one(error: int) -> None:
    with pytest.raises(DriverError) as caught:
        NvmlDriver(FakeNvml(error=error))
    assert caught.value.absent
    with pytest.raises(DriverError) as caught:
        NvmlDriver(FakeNvml(error=pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH))
    assert not caught.value.absent


def test_declared_devices_keep_their_order_and_their_threads_and_cpus() -> None:
    declared = [Declared("gpu:2", threads=4, cpus=frozenset({0, 1})), Declared("gpu:0")]
    third, first = backend_on(three_gpus()).devices(declared)
    assert (third.device_id, third.uuid, third.threads, third.cpus) == ("gpu:2", UUIDS[2], 4, frozenset({0, 1}))
    assert (first.device_id, first.threads, first.cpus) == ("gpu:0", None, None)


def test_a_declared_device_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ConfigError) as caught:
        backend_on(three_gpus(), "0,1").devices([Declared("gpu:1"), Declared("gpu:2")])
    assert [str(problem) for problem in caught.value.problems] == [
        "devices[1].device_id: the backend cuda has no 'gpu:2' here; it has gpu:0, gpu:1"
    ]


def test_if_there_is_no_gpu_the_error_names_the_mask() -> None:
    with pytest.raises(StartupError, match=r"^no NVIDIA GPU found$"):
        backend_on(FakeNvml()).devices([])
    with pytest.raises(StartupError, match=r"^no NVIDIA GPU found with CUDA_VISIBLE_DEVICES='-1'$"):
        backend_on(three_gpus(), "-1").devices([])
