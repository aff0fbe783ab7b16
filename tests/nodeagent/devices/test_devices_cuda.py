"""NVIDIA GPUs, with a fake library and with recorded output of nvidia-smi, whose source is named with each."""

import logging
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pynvml
import pytest
import trio

from fakes.nvml import GIB, FakeGpu, FakeNvml, Memory
from nodeagent.devices.backend import DriverError
from nodeagent.devices.cuda import CudaBackend, open_driver
from nodeagent.devices.nvidia_driver import Driver, GpuReading
from nodeagent.devices.nvml_driver import NvmlDriver
from nodeagent.devices.smi_driver import SmiDriver, SmiResult, parse_smi, run_smi
from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.errors import ConfigError, StartupError

MIB = 1 << 20

# Invented, in the format of real ones; the second and third share a prefix.
UUIDS = (
    "GPU-c7b57be0-94ff-d352-a59b-d0ee00aeed43",
    "GPU-d6de6afc-bdfe-75c4-5273-0544439153fc",
    "GPU-d6aa6afc-1111-75c4-5273-0544439153fc",
)
MIG = "MIG-41b3f0e6-1ed4-5b1b-9c6c-8a1b9c4c7a11"


@dataclass(frozen=True)
class Declared:
    device_id: str
    threads: int | None = None
    cpus: frozenset[int] | None = None


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
    assert backend.child_env(first) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": UUIDS[2]}
    assert backend.child_env(second) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": UUIDS[1]}
    assert backend.child_args(first) == []


def test_a_gpu_without_a_uuid_is_pinned_by_its_number() -> None:
    backend = CudaBackend(SmiDriver(played(ok("1, [N/A], GRID T4-8Q, 8192, 0, 8192, 0, 40, [N/A]"))), {})
    (device,) = backend.discover()
    assert device.uuid is None
    assert backend.child_env(device)["CUDA_VISIBLE_DEVICES"] == "1"


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


# nvidia-smi


def ok(*rows: str) -> SmiResult:
    return SmiResult(0, "".join(f"{row}\n" for row in rows))


def played(*results: SmiResult | DriverError) -> Callable[[Sequence[str]], SmiResult]:
    """One result for each call, the last one again and again."""
    remaining = list(results)

    def run(command: Sequence[str]) -> SmiResult:
        assert command[0] == "nvidia-smi"
        result = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        if isinstance(result, DriverError):
            raise result
        return result

    return run


# Values of a GeForce RTX 2080 (driver 440.64) as reported to the project Ricks-Lab/gpu-utils, put in our order; used
# and free are not in that report.
RTX_2080 = "0, GPU-22b2c6ac-2d49-4863-197c-9c469071178a, GeForce RTX 2080, 7979, 979, 7000, 86, 45, 176.98"
# A DGX Spark (driver 580.173.02) as reported to the project nvitop, put in our order; its index and UUID are ours.
GB10 = f"1, {UUIDS[1]}, NVIDIA GB10, [N/A], [N/A], [N/A], 0, 35, 11.17"


def test_recorded_rows_are_parsed() -> None:
    (_, discrete), (unified, shared) = parse_smi(f"{RTX_2080}\n{GB10}\n")
    assert discrete == GpuReading(
        memory_total_bytes=7979 * MIB,
        memory_used_bytes=979 * MIB,
        memory_free_bytes=7000 * MIB,
        utilization_ratio=0.86,
        temperature_celsius=45.0,
        power_watts=176.98,
    )
    assert (unified.index, unified.uuid, unified.name) == (1, UUIDS[1], "NVIDIA GB10")
    assert shared == GpuReading(utilization_ratio=0.0, temperature_celsius=35.0, power_watts=11.17)


# Texts for "no value" as reported to the projects i3pystatus (the first three; the second is of older drivers) and
# MindMiner (driver 442.19), and in the shape that nvidia-smi gives to the errors of NVML.
@pytest.mark.parametrize(
    "word", ["[N/A]", "[Not Supported]", "[Unknown Error]", "N/A", "[GPU is lost]", "ERR!", "", "nan"]
)
def test_every_text_for_a_missing_value_is_unknown(word: str) -> None:
    ((gpu, reading),) = parse_smi(f"0, {UUIDS[0]}, NVIDIA L4, {', '.join([word] * 6)}\n")
    assert gpu.memory_total_bytes is None
    assert reading == GpuReading()


def test_lines_that_are_no_rows_are_skipped() -> None:
    assert parse_smi("") == []
    assert parse_smi("Unable to determine the device handle for GPU 0000:0B:00.0: Unknown Error\n") == []
    assert parse_smi("No devices were found\n") == []
    assert parse_smi(f"index, uuid, name, a, b, c, d, e, f\n{RTX_2080}, one too many\n") == []
    assert len(parse_smi(f"Unable to determine the device handle for GPU0000:65:00.0: Unknown Error\n{GB10}\n")) == 1


def test_gpus_are_found_and_read_by_the_command() -> None:
    backend = CudaBackend(SmiDriver(played(ok(RTX_2080, GB10))), {"CUDA_VISIBLE_DEVICES": "1,GPU-22b2"})
    unified, discrete = backend.discover()
    assert (unified.device_id, unified.memory_total_bytes) == ("gpu:1", None)
    assert (discrete.device_id, discrete.memory_total_bytes) == ("gpu:0", 7979 * MIB)
    assert backend.read(unified, 1.0).power_watts == 11.17
    assert backend.read(discrete, 1.0).memory_free_bytes == 7000 * MIB


def test_slices_are_devices_with_unknown_metrics_since_the_command_does_not_list_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = CudaBackend(SmiDriver(played(ok(RTX_2080))), {"CUDA_VISIBLE_DEVICES": MIG})
    (device,) = backend.discover()
    assert backend.child_env(device)["CUDA_VISIBLE_DEVICES"] == MIG
    assert [backend.read(device, now) for now in (1.0, 2.0)] == [
        DeviceMetrics(measured_at=1.0),
        DeviceMetrics(measured_at=2.0),
    ]
    assert caplog.messages == [f"gpu:0 can't be measured: nvidia-smi does not list {MIG}"]


def test_one_call_serves_all_gpus_that_are_read_one_after_the_other() -> None:
    calls = []
    run = played(ok(RTX_2080, GB10))

    def counting(command: Sequence[str]) -> SmiResult:
        calls.append(command)
        return run(command)

    backend = CudaBackend(SmiDriver(counting), {})
    devices = backend.discover()
    calls.clear()
    for now in (10.0, 12.0):
        for device in devices:
            backend.read(device, now + 0.1 * device.index)
    assert len(calls) == 2


# Reported to the project gputil: its output after the driver's packages were upgraded while the driver was loaded.
MISMATCH = SmiResult(18, "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 535.161\n")


def test_a_command_that_fails_leaves_the_metrics_unknown_and_warns_once(caplog: pytest.LogCaptureFixture) -> None:
    backend = CudaBackend(SmiDriver(played(ok(RTX_2080), ok(RTX_2080), MISMATCH, MISMATCH, ok(RTX_2080))), {})
    (device,) = backend.discover()
    assert [backend.read(device, now) for now in (1.0, 2.0)] == [
        DeviceMetrics(measured_at=1.0),
        DeviceMetrics(measured_at=2.0),
    ]
    assert backend.read(device, 3.0).utilization_ratio == 0.86
    assert caplog.messages == [
        "gpu:0 can't be measured: nvidia-smi: Failed to initialize NVML: Driver/library version mismatch (exit 18)",
        "gpu:0 can be measured again",
    ]


def test_a_gpu_that_the_command_no_longer_lists_is_unknown(caplog: pytest.LogCaptureFixture) -> None:
    backend = CudaBackend(SmiDriver(played(ok(RTX_2080, GB10), ok(RTX_2080, GB10), ok(GB10))), {})
    discrete, unified = backend.discover()
    assert backend.read(discrete, 1.0) == DeviceMetrics(measured_at=1.0)
    assert backend.read(unified, 1.0).power_watts == 11.17
    assert "nvidia-smi does not list GPU-22b2c6ac" in caplog.text


def test_no_devices_is_a_valid_result() -> None:
    assert SmiDriver(played(SmiResult(6, "No devices were found\n"))).gpus() == []


@pytest.mark.real
def test_a_command_that_can_not_be_used_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DriverError, match=r"^nvidia-smi: Failed to initialize NVML.* \(exit 18\)$"):
        SmiDriver(played(MISMATCH))
    with pytest.raises(DriverError, match="not found") as caught:
        run_smi([str(tmp_path / "nvidia-smi")])
    assert caught.value.absent
    with pytest.raises(DriverError, match="Permission denied") as caught:
        run_smi([str(tmp_path)])
    assert not caught.value.absent


@pytest.mark.real
def test_the_output_of_the_command_is_read_from_stdout_or_else_from_stderr() -> None:
    assert run_smi([sys.executable, "-c", "print('0, GPU-a')"]) == SmiResult(0, "0, GPU-a\n")
    said = run_smi([sys.executable, "-c", "import sys; sys.stderr.write('driver gone'); sys.exit(9)"])
    assert said == SmiResult(9, "driver gone")


# Library, else command


def library(error: int | None = None) -> Callable[[], Driver]:
    return lambda: NvmlDriver(FakeNvml(gpus=[FakeGpu(uuid=UUIDS[0])], error=error))


def command(*results: SmiResult | DriverError) -> Callable[[], Driver]:
    return lambda: SmiDriver(played(*results))


def test_the_command_is_used_only_if_the_library_can_not_be(caplog: pytest.LogCaptureFixture) -> None:
    assert open_driver(library(), command(MISMATCH)).gpus()[0].name == "NVIDIA L4"
    assert caplog.messages == []
    without_library = open_driver(library(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND), command(ok(RTX_2080)))
    assert without_library.gpus()[0].name == "GeForce RTX 2080"
    assert caplog.messages == ["NVML: NVML Shared Library Not Found: using nvidia-smi instead"]


@pytest.mark.parametrize("smi_absent", [True, False])
def test_if_neither_can_be_used_the_error_has_both_reasons(smi_absent: bool) -> None:
    neither = DriverError("nvidia-smi: not found", absent=smi_absent)
    with pytest.raises(DriverError, match=r"^NVML: NVML Shared Library Not Found; nvidia-smi: not found$") as caught:
        open_driver(library(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND), command(neither))
    assert caught.value.absent is smi_absent
