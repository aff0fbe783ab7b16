"""What is asked of the NVIDIA driver, in whatever way: see nvml_driver and smi_driver.

GPUs are numbered by their PCI bus ids, as both ways do, and CUDA with CUDA_DEVICE_ORDER=PCI_BUS_ID.
"""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU as the driver lists it. `uuid` is None where it has none (some virtual GPUs)."""

    index: int
    uuid: str | None
    name: str
    memory_total_bytes: int | None


@dataclass(frozen=True, slots=True)
class GpuReading:
    """What was measured; None is unknown. GPUs that share the host's memory say nothing of theirs."""

    memory_total_bytes: int | None = None
    memory_used_bytes: int | None = None
    memory_free_bytes: int | None = None
    utilization_ratio: float | None = None
    temperature_celsius: float | None = None
    power_watts: float | None = None


class Driver(Protocol):
    """One way to ask. All of it blocks; `gpus` and `read` raise DriverError."""

    def gpus(self) -> list[Gpu]: ...

    def mig_device(self, uuid: str, index: int) -> Gpu:
        """The slice of a GPU (MIG) of that uuid, to be called by that index."""
        ...

    def read(self, uuid: str | None, index: int, now: float) -> GpuReading:
        """Measure the GPU or slice of that uuid; the index counts where there is no uuid."""
        ...

    def close(self) -> None: ...
