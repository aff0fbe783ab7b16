"""The interface to one vendor's devices: find them, measure them, and keep a child to one of them.

DriverError(NodeAgentError)    the vendor's driver does not answer; never leaves `nodeagent.devices`
"""

import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
from msgspec.structs import replace

from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.errors import ConfigError, NodeAgentError, Problem


class DriverError(NodeAgentError):
    """The driver, or one of its devices, does not answer.

    `absent` is True if no driver is installed, as on any host without such devices: then nothing is broken.
    """

    def __init__(self, reason: str, *, absent: bool = False) -> None:
        self.reason = reason
        self.absent = absent
        super().__init__(reason)


logger = logging.getLogger(__name__)

T = TypeVar("T")


class Build(msgspec.Struct, frozen=True):
    """The llama-server that runs on devices, the variables that the configuration gives it there, and how the ids of
    these devices begin."""

    binary: Path
    env: Mapping[str, str] = msgspec.field(default_factory=dict)
    id_prefix: str = "gpu"


class DeclaredDevice(Protocol):
    """An entry of `devices` in the configuration."""

    @property
    def device_id(self) -> str: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def cpus(self) -> frozenset[int] | None: ...
    @property
    def llama_server_bin(self) -> str | None: ...
    @property
    def env(self) -> Mapping[str, str]: ...


class Backend(Protocol):
    """One vendor's devices. Every method but `close` may block on a driver, for seconds at worst: call it in a thread.

    Whoever creates it closes it.
    """

    @property
    def name(self) -> str:
        """The name in the configuration: `cpu`, `cuda`, `vulkan`, ..."""
        ...

    def discover(self) -> list[DeviceRef]:
        """The devices that this process may use. Raises StartupError if the driver does not answer."""
        ...

    def devices(self, declared: Sequence[DeclaredDevice]) -> list[DeviceRef]:
        """The declared devices in their order, with their declared threads and CPUs; every device if none is declared.

        Raises ConfigError naming each device that does not exist, and StartupError if the driver does not answer.
        """
        ...

    def read(self, device: DeviceRef, now: float) -> DeviceMetrics:
        """Measure the device at `now`, which becomes `measured_at`. What can't be measured is None.

        Raises at most OSError, if the host is out of file descriptors, say.
        """
        ...

    def child_env(self, device: DeviceRef) -> dict[str, str]:
        """The variables that keep a child to this device, or its members, to be added to the inherited environment."""
        ...

    def child_args(self, device: DeviceRef) -> list[str]:
        """The arguments of llama-server that do the same."""
        ...

    def close(self) -> None:
        """Release the driver; no other method is called afterwards. Does not block."""
        ...


def within(timeout_s: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises, or DriverError if a driver hangs in it for that long.

    Its thread is left behind then, which does not keep the process from ending.
    """
    results: queue.SimpleQueue[Callable[[], T]] = queue.SimpleQueue()

    def run() -> None:
        try:
            value = call()
        except Exception as error:
            failure = error

            def fail() -> T:
                raise failure

            results.put(fail)
        else:
            results.put(lambda: value)

    threading.Thread(target=run, name="driver", daemon=True).start()
    try:
        result = results.get(timeout=timeout_s)
    except queue.Empty:
        raise DriverError(f"no answer from the driver in {timeout_s:g} s") from None
    return result()


class Faults:
    """Reads devices of one driver, and says once when one can't be read, and once when it can be again.

    What changes: `_reasons`, why a device could not be read the last time, in `read`.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    def read(self, device_id: str, now: float, measure: Callable[[], DeviceMetrics]) -> DeviceMetrics:
        """What `measure` returns; if it raises DriverError, nothing is known."""
        try:
            reading = measure()
        except DriverError as error:
            if self._reasons.get(device_id) != error.reason:
                self._reasons[device_id] = error.reason
                logger.warning("%s can't be measured: %s", device_id, error.reason)
            return DeviceMetrics(measured_at=now)
        if self._reasons.pop(device_id, None) is not None:
            logger.warning("%s can be measured again", device_id)
        return reading


def as_declared(found: Sequence[DeviceRef], declared: Sequence[DeclaredDevice], backend: str) -> list[DeviceRef]:
    """The declared ones of these devices, with what their entries say. Raises ConfigError."""
    by_id = {device.device_id: device for device in found}
    known = ", ".join(by_id) or "no device"
    problems = [
        Problem(f"the backend {backend} has no {entry.device_id!r} here; it has {known}", f"devices[{index}].device_id")
        for index, entry in enumerate(declared)
        if entry.device_id not in by_id
    ]
    if problems:
        raise ConfigError(problems)
    return [
        replace(
            by_id[entry.device_id],
            threads=entry.threads,
            cpus=entry.cpus,
            llama_server_bin=entry.llama_server_bin,
            env=entry.env,
        )
        for entry in declared
    ]
