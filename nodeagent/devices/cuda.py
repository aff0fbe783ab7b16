"""NVIDIA GPUs, as llama-server's CUDA build sees them.

A device is named by its number in `nvidia-smi`: `gpu:1` is GPU 1, also if the agent was started with
CUDA_VISIBLE_DEVICES. GPUs that this mask hides are not used. If it names slices of GPUs (MIG), these are the devices,
numbered in the order of the mask.

A child sees only its own GPU, by UUID: unlike the numbers, it does not change when another GPU falls off the bus.
"""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from nodeagent.devices.backend import DeclaredDevice, DriverError, Faults, as_declared
from nodeagent.devices.drm import Readings
from nodeagent.devices.nvidia_driver import Driver, Gpu, measured
from nodeagent.devices.pinning import pin_all
from nodeagent.devices.smi_driver import SmiDriver
from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.errors import StartupError

logger = logging.getLogger(__name__)

_MASK: Final = "CUDA_VISIBLE_DEVICES"


def _library() -> Driver:
    # Here: pynvml takes 2 MiB, and a node without a GPU does not need it.
    from nodeagent.devices.nvml_driver import NvmlDriver

    return NvmlDriver()


def open_driver(library: Callable[[], Driver] = _library, command: Callable[[], Driver] = SmiDriver) -> Driver:
    """The library if it can be used, else the command. Raises DriverError with both reasons."""
    try:
        return library()
    except DriverError as no_library:
        try:
            driver = command()
        except DriverError as no_command:
            absent = no_library.absent and no_command.absent
            raise DriverError(f"{no_library}; {no_command}", absent=absent) from no_command
        logger.warning("%s: using nvidia-smi instead", no_library)
        return driver


class CudaBackend:
    """NVIDIA GPUs; implements `backend.Backend`."""

    name: Final = "cuda"

    def __init__(
        self,
        driver: Driver | None = None,
        environ: Mapping[str, str] = os.environ,
        *,
        id_prefix: str = "gpu",
        root: Path = Path("/"),
    ) -> None:
        """Opens a driver, NVML or else nvidia-smi, unless one is given; `root` is where sys is. Raises DriverError."""
        self._driver = driver if driver is not None else open_driver()
        self._mask = environ.get(_MASK)
        self._id_prefix = id_prefix
        self._faults = Faults()
        self._readings = Readings()
        self._root = root

    def discover(self) -> list[DeviceRef]:
        """The GPUs that the mask does not hide, in its order. Raises StartupError."""
        try:
            return [self._device(gpu) for gpu in visible(self._mask, self._driver)]
        except DriverError as error:
            raise StartupError(f"the GPUs can't be listed: {error}") from error

    def devices(self, declared: Sequence[DeclaredDevice]) -> list[DeviceRef]:
        """See Backend. Also raises StartupError if there is no GPU at all."""
        found = self.discover()
        if not found:
            hidden = f" with {_MASK}={self._mask!r}" if self._mask is not None else ""
            raise StartupError(f"no NVIDIA GPU found{hidden}")
        return as_declared(found, declared, self.name) if declared else found

    def read(self, device: DeviceRef, now: float) -> DeviceMetrics:
        """See Backend. Logs once when a device can't be read, and once when it can be read again.

        A card of a laptop sleeps, and each question to NVIDIA's driver wakes it.
        """

        def ask() -> DeviceMetrics:
            return measured(self._driver.read(device.uuid, device.index, now), now)

        def measure() -> DeviceMetrics:
            if device.pci_id is None:
                return ask()
            return self._readings.read(self._root / "sys/bus/pci/devices" / device.pci_id, now, ask)

        return self._faults.read(device.device_id, now, measure)

    def child_env(self, device: DeviceRef) -> dict[str, str]:
        """Other backends that the build may have are kept off their devices too: Vulkan would list the other GPUs."""
        return dict(pin_all(self.name, [("CUDA0", part.uuid or str(part.index)) for part in device.parts]).env)

    def child_args(self, device: DeviceRef) -> list[str]:
        """None: a server uses every GPU that the mask shows. A build without CUDA would exit on `--device CUDA0`."""
        return []

    def close(self) -> None:
        self._driver.close()

    def _device(self, gpu: Gpu) -> DeviceRef:
        return DeviceRef(
            device_id=f"{self._id_prefix}:{gpu.index}",
            backend=self.name,
            index=gpu.index,
            name=gpu.name,
            uuid=gpu.uuid,
            memory_total_bytes=gpu.memory_total_bytes,
            pci_id=gpu.pci_id,
        )


def visible(mask: str | None, driver: Driver) -> list[Gpu]:
    """The devices that CUDA would show with this value of CUDA_VISIBLE_DEVICES. Raises DriverError.

    As in "CUDA Environment Variables" of NVIDIA's programming guide: entries are numbers, or UUIDs cut to any length
    that is still unique. An empty mask shows no device. The first invalid entry (-1, for one) hides itself and the
    rest. A device that is named twice makes the whole mask invalid. Numbers are those of nvidia-smi; CUDA numbers the
    GPUs like that only with CUDA_DEVICE_ORDER=PCI_BUS_ID, or if all GPUs are of one model.
    """
    gpus = driver.gpus()
    if mask is None:
        return gpus
    chosen: list[Gpu] = []
    for position, entry in enumerate(mask.split(",")):
        gpu = _named(entry.strip(), position, gpus, driver)
        if gpu is None:
            break
        if any(gpu == other or (gpu.uuid is not None and gpu.uuid == other.uuid) for other in chosen):
            return []
        chosen.append(gpu)
    return chosen


def _named(entry: str, position: int, gpus: Sequence[Gpu], driver: Driver) -> Gpu | None:
    """The one device that an entry of a mask names, None if it names none or several."""
    if entry.startswith("MIG-"):
        try:
            return driver.mig_device(entry, position)
        except DriverError as error:
            logger.warning("%s contains %s, which can't be used: %s", _MASK, entry, error)
            return None
    if entry.startswith("GPU-"):
        named = [gpu for gpu in gpus if gpu.uuid is not None and gpu.uuid.startswith(entry)]
    else:
        named = [gpu for gpu in gpus if entry.isdecimal() and gpu.index == int(entry)]
    return named[0] if len(named) == 1 else None
