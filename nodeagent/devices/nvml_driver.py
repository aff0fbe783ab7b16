"""The NVIDIA driver through its library NVML."""

import logging
import threading
from collections.abc import Callable
from typing import Final, Protocol, TypeVar, cast

import pynvml

from nodeagent.devices.backend import DriverError
from nodeagent.devices.listing import pci_address
from nodeagent.devices.nvidia_driver import Gpu, GpuReading

logger = logging.getLogger(__name__)

T = TypeVar("T")


class NvmlMemory(Protocol):
    @property
    def total(self) -> int: ...
    @property
    def free(self) -> int: ...
    @property
    def used(self) -> int: ...


class NvmlUtilization(Protocol):
    @property
    def gpu(self) -> int: ...


class NvmlPci(Protocol):
    @property
    def busId(self) -> str: ...


class Nvml(Protocol):
    """The part of the module `pynvml` (nvidia-ml-py) that is used here. Each function may raise `pynvml.NVMLError`."""

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int, /) -> object: ...
    def nvmlDeviceGetHandleByUUID(self, uuid: str, /) -> object: ...
    def nvmlDeviceGetUUID(self, handle: object, /) -> str: ...
    def nvmlDeviceGetName(self, handle: object, /) -> str: ...
    def nvmlDeviceGetPciInfo(self, handle: object, /) -> NvmlPci: ...
    def nvmlDeviceGetMemoryInfo(self, handle: object, /) -> NvmlMemory: ...
    def nvmlDeviceGetUtilizationRates(self, handle: object, /) -> NvmlUtilization: ...
    def nvmlDeviceGetTemperature(self, handle: object, sensor: int, /) -> int: ...
    def nvmlDeviceGetPowerUsage(self, handle: object, /) -> int: ...


# The errors of a healthy device for a value that it does not have. A slice of a GPU returns the third for what only a
# whole GPU has.
_NOT_AVAILABLE: Final = (
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_NO_PERMISSION,
)


class NvmlDriver:
    """NVML, loaded and initialized; implements `nvidia_driver.Driver`. Raises DriverError if it can't be.

    After an error the next call initializes it again: a driver that was reloaded answers only then. What changes:
    `_initialized`, with `_lock` held.
    """

    def __init__(self, nvml: Nvml | None = None) -> None:
        self._nvml = cast(Nvml, pynvml) if nvml is None else nvml
        self._lock = threading.Lock()
        self._initialized = False
        self._query(lambda nvml: None)

    def gpus(self) -> list[Gpu]:
        """All GPUs but those that don't answer; each of those is logged."""
        return [gpu for index in range(self._query(self._nvml_count)) if (gpu := self._gpu(index)) is not None]

    def mig_device(self, uuid: str, index: int) -> Gpu:
        return self._query(lambda nvml: _described(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid), index))

    def read(self, uuid: str | None, index: int, now: float) -> GpuReading:
        def measure(nvml: Nvml) -> GpuReading:
            # Looked up each time: a handle is invalid after a reset of its GPU.
            if uuid is None:
                return _measured(nvml, nvml.nvmlDeviceGetHandleByIndex(index))
            return _measured(nvml, nvml.nvmlDeviceGetHandleByUUID(uuid))

        return self._query(measure)

    def close(self) -> None:
        """Does nothing while a query hangs in a broken driver: the end of the process releases it as well."""
        if self._lock.acquire(blocking=False):
            try:
                self._shut_down()
            finally:
                self._lock.release()

    @staticmethod
    def _nvml_count(nvml: Nvml) -> int:
        return nvml.nvmlDeviceGetCount()

    def _gpu(self, index: int) -> Gpu | None:
        try:
            return self._query(lambda nvml: _described(nvml, nvml.nvmlDeviceGetHandleByIndex(index), index))
        except DriverError as error:
            logger.warning("GPU %d is ignored: %s", index, error)
            return None

    def _query(self, query: Callable[[Nvml], T]) -> T:
        with self._lock:
            try:
                if not self._initialized:
                    self._nvml.nvmlInit()
                    self._initialized = True
                return query(self._nvml)
            except pynvml.NVMLError as error:
                self._shut_down()
                absent = error.value in (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
                raise DriverError(f"NVML: {error}", absent=absent) from error

    def _shut_down(self) -> None:
        if not self._initialized:
            return
        self._initialized = False
        try:
            self._nvml.nvmlShutdown()
        except pynvml.NVMLError as error:
            logger.debug("NVML could not be shut down: %s", error)


def _described(nvml: Nvml, handle: object, index: int) -> Gpu:
    memory = _value_or_none(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    pci = _value_or_none(lambda: nvml.nvmlDeviceGetPciInfo(handle))
    return Gpu(
        index=index,
        uuid=_value_or_none(lambda: nvml.nvmlDeviceGetUUID(handle)),
        name=nvml.nvmlDeviceGetName(handle),
        memory_total_bytes=None if memory is None else memory.total,
        pci_id=None if pci is None else pci_address(pci.busId),
    )


def _measured(nvml: Nvml, handle: object) -> GpuReading:
    memory = _value_or_none(lambda: nvml.nvmlDeviceGetMemoryInfo(handle))
    utilization = _value_or_none(lambda: nvml.nvmlDeviceGetUtilizationRates(handle))
    temperature = _value_or_none(lambda: nvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU))
    milliwatts = _value_or_none(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
    return GpuReading(
        memory_total_bytes=None if memory is None else memory.total,
        memory_used_bytes=None if memory is None else memory.used,
        memory_free_bytes=None if memory is None else memory.free,
        utilization_ratio=None if utilization is None else utilization.gpu / 100,
        temperature_celsius=None if temperature is None else float(temperature),
        power_watts=None if milliwatts is None else milliwatts / 1000,
    )


def _value_or_none(read: Callable[[], T]) -> T | None:
    try:
        return read()
    except pynvml.NVMLError as error:
        if error.value in _NOT_AVAILABLE:
            return None
        raise
