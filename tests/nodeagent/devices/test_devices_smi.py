"""NVIDIA GPUs through the command nvidia-smi, with recorded output, whose source is named with each."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pynvml
import pytest

from fakes.nvml import MIG, UUIDS, FakeGpu, FakeNvml
from nodeagent.devices.backend import DriverError
from nodeagent.devices.cuda import CudaBackend, open_driver
from nodeagent.devices.nvidia_driver import Driver, GpuReading
from nodeagent.devices.nvml_driver import NvmlDriver
from nodeagent.devices.smi_driver import SmiDriver, SmiResult, parse_smi, run_smi
from nodeagent.devices.values import DeviceMetrics

MIB = 1 << 20


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


def test_a_gpu_without_a_uuid_is_pinned_by_its_number() -> None:
    backend = CudaBackend(SmiDriver(played(ok("1, [N/A], GRID T4-8Q, 8192, 0, 8192, 0, 40, [N/A]"))), {})
    (device,) = backend.discover()
    assert device.uuid is None
    assert backend.child_env(device)["CUDA_VISIBLE_DEVICES"] == "1"


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
