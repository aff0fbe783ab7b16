"""The interface to the NVIDIA driver; `nvml_driver` and `smi_driver` implement it.

Both number the GPUs by their PCI bus ids, as CUDA does with CUDA_DEVICE_ORDER=PCI_BUS_ID.
"""

from typing import Protocol

import msgspec

from nodeagent.devices.values import DeviceMetrics


class Gpu(msgspec.Struct, frozen=True):
    """One GPU as the driver lists it. `uuid` is None if it has none (some virtual GPUs); `pci_id` is as in sysfs."""

    index: int
    uuid: str | None
    name: str
    memory_total_bytes: int | None
    pci_id: str | None = None


class GpuReading(msgspec.Struct, frozen=True, kw_only=True):
    """What was measured; None is unknown, as the memory of a GPU that shares the host's memory."""

    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    utilization_ratio: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None


def measured(reading: GpuReading, now: float) -> DeviceMetrics:
    """The same, as a reading taken at that time."""
    return DeviceMetrics(
        measured_at=now,
        memory_total_bytes=reading.memory_total_bytes,
        memory_used_bytes=reading.memory_used_bytes,
        memory_free_bytes=reading.memory_free_bytes,
        utilization_ratio=reading.utilization_ratio,
        temperature_celsius=reading.temperature_celsius,
        power_watts=reading.power_watts,
    )


class Driver(Protocol):
    """One way to query the driver. Every method but `close` may block, and raises DriverError."""

    def gpus(self) -> list[Gpu]: ...

    def mig_device(self, uuid: str, index: int) -> Gpu:
        """The slice of a GPU (MIG) with that UUID; it gets that index."""
        ...

    def read(self, uuid: str | None, index: int, now: float) -> GpuReading:
        """Measure the GPU or slice with that UUID, or the GPU with that index if `uuid` is None."""
        ...

    def close(self) -> None: ...
