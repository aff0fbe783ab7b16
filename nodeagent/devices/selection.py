"""Which backend the agent uses on this host."""

import logging
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from nodeagent.devices.backend import Backend, DeclaredDevice, DriverError
from nodeagent.devices.cpu import CpuBackend
from nodeagent.devices.cuda import CudaBackend
from nodeagent.devices.limits import Cpus, with_threads
from nodeagent.devices.values import DeviceRef
from nodeagent.errors import StartupError

logger = logging.getLogger(__name__)

# Each opens its driver, and raises DriverError if it can't.
BACKENDS: Final[Mapping[str, Callable[[], Backend]]] = MappingProxyType({"cpu": CpuBackend, "cuda": CudaBackend})


def select(
    name: str, declared: Sequence[DeclaredDevice] = (), *, backends: Mapping[str, Callable[[], Backend]] = BACKENDS
) -> Backend:
    """Open the backend of that name; the caller closes it. Blocks on drivers, for seconds at worst.

    "auto" selects the backend of the declared devices; if none is declared, `cuda` if it finds a device, else `cpu`.
    Raises StartupError if the selected backend can't be used.
    """
    if name == "auto" and declared:
        name = "cpu" if declared[0].device_id.startswith("cpu:") else "cuda"
    if name == "auto":
        return _cuda_with_devices(backends) or backends["cpu"]()
    try:
        return backends[name]()
    except DriverError as error:
        raise StartupError(f"backend {name} can't be used: {error}") from error


def devices_of(backend: Backend, declared: Sequence[DeclaredDevice], cpus: Cpus) -> list[DeviceRef]:
    """The backend's devices, each with the threads that this process's CPUs allow. See `Backend.devices`."""
    return with_threads(backend.devices(declared), cpus)


def _cuda_with_devices(backends: Mapping[str, Callable[[], Backend]]) -> Backend | None:
    try:
        backend = backends["cuda"]()
    except DriverError as error:
        # A driver that is installed and fails is worth a warning: the node starts without its GPUs.
        logger.log(logging.DEBUG if error.absent else logging.WARNING, "no GPUs, using the CPU: %s", error)
        return None
    try:
        found = backend.discover()
    except StartupError as error:
        logger.warning("no GPUs, using the CPU: %s", error)
        found = []
    if found:
        return backend
    backend.close()
    return None
