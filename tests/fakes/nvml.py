"""A fake of the driver library: the part of `pynvml` that the agent uses, with errors of the real classes."""

from collections import Counter
from dataclasses import dataclass, field

import pynvml

GIB = 1 << 30

# Invented, in the format of real ones; the second and third share a prefix.
UUIDS = (
    "GPU-c7b57be0-94ff-d352-a59b-d0ee00aeed43",
    "GPU-d6de6afc-bdfe-75c4-5273-0544439153fc",
    "GPU-d6aa6afc-1111-75c4-5273-0544439153fc",
)
MIG = "MIG-41b3f0e6-1ed4-5b1b-9c6c-8a1b9c4c7a11"


@dataclass
class Memory:
    total: int
    used: int

    @property
    def free(self) -> int:
        return self.total - self.used


@dataclass
class Pci:
    busId: str


@dataclass
class Utilization:
    gpu: int


@dataclass(kw_only=True)
class FakeGpu:
    """A GPU. None is a value that it does not have; `error` is the NVML_ERROR number that every query raises."""

    uuid: str
    name: str = "NVIDIA L4"
    memory: Memory | None = field(default_factory=lambda: Memory(24 * GIB, 1 * GIB))
    utilization: int | None = 37
    temperature: int | None = 41
    milliwatts: int | None = 16_540
    bus_id: str | None = None
    error: int | None = None


@dataclass(kw_only=True)
class FakeNvml:
    """The library. `error` is what every call raises; so does a call before it is initialised, as with the real one."""

    gpus: list[FakeGpu] = field(default_factory=list)
    slices: list[FakeGpu] = field(default_factory=list)
    error: int | None = None
    calls: Counter[str] = field(default_factory=Counter)
    initialised: int = 0

    def nvmlInit(self) -> None:
        self.calls["init"] += 1
        self._fail_if(self.error)
        self.initialised += 1

    def nvmlShutdown(self) -> None:
        self.calls["shutdown"] += 1
        self._fail_if(pynvml.NVML_ERROR_UNINITIALIZED if not self.initialised else None)
        self.initialised -= 1

    def nvmlDeviceGetCount(self) -> int:
        self._check()
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> FakeGpu:
        self._check()
        self._fail_if(self.gpus[index].error)
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> FakeGpu:
        self._check()
        for gpu in self.gpus + self.slices:
            if gpu.uuid == uuid:
                self._fail_if(gpu.error)
                return gpu
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)

    def nvmlDeviceGetUUID(self, handle: object, /) -> str:
        return self._gpu(handle).uuid

    def nvmlDeviceGetName(self, handle: object, /) -> str:
        return self._gpu(handle).name

    def nvmlDeviceGetPciInfo(self, handle: object, /) -> Pci:
        bus_id = self._gpu(handle).bus_id
        self._fail_if(pynvml.NVML_ERROR_NOT_SUPPORTED if bus_id is None else None)
        assert bus_id is not None
        return Pci(bus_id)

    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> Memory:
        gpu = self._gpu(handle)
        self._fail_if(pynvml.NVML_ERROR_NOT_SUPPORTED if gpu.memory is None else None)
        assert gpu.memory is not None
        return gpu.memory

    def nvmlDeviceGetUtilizationRates(self, handle: object, /) -> Utilization:
        return Utilization(self._had(handle, self._gpu(handle).utilization))

    def nvmlDeviceGetTemperature(self, handle: object, sensor: int, /) -> int:
        assert sensor == pynvml.NVML_TEMPERATURE_GPU
        return self._had(handle, self._gpu(handle).temperature)

    def nvmlDeviceGetPowerUsage(self, handle: object, /) -> int:
        return self._had(handle, self._gpu(handle).milliwatts)

    def _gpu(self, handle: object) -> FakeGpu:
        self._check()
        assert isinstance(handle, FakeGpu)
        self._fail_if(handle.error)
        return handle

    def _had(self, handle: object, value: int | None) -> int:
        if value is None:
            # What the real library raises for a slice, and for a whole GPU.
            in_slice = handle in self.slices
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT if in_slice else pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def _check(self) -> None:
        self._fail_if(self.error if self.initialised else pynvml.NVML_ERROR_UNINITIALIZED)

    @staticmethod
    def _fail_if(error: int | None) -> None:
        if error is not None:
            raise pynvml.NVMLError(error)
