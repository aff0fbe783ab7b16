"""The interface to one vendor's devices: find them, measure them, and keep a child to one of them.

DriverError(NodeAgentError)    the vendor's driver does not answer; never leaves `nodeagent.devices`
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

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


class DeclaredDevice(Protocol):
    """An entry of `devices` in the configuration."""

    @property
    def device_id(self) -> str: ...
    @property
    def threads(self) -> int | None: ...
    @property
    def cpus(self) -> frozenset[int] | None: ...


class Backend(Protocol):
    """One vendor's devices. Every method but `close` may block on a driver, for seconds at worst: call it in a thread.

    Whoever creates it closes it.
    """

    @property
    def name(self) -> str:
        """The name in the configuration: `cpu`, `cuda`."""
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
        """The variables that keep a child to this device, to be added to the inherited environment."""
        ...

    def child_args(self, device: DeviceRef) -> list[str]:
        """The arguments of llama-server that do the same."""
        ...

    def close(self) -> None:
        """Release the driver; no other method is called afterwards. Does not block."""
        ...


def as_declared(found: Sequence[DeviceRef], declared: Sequence[DeclaredDevice], backend: str) -> list[DeviceRef]:
    """The declared ones of these devices, with their threads and CPUs. Raises ConfigError."""
    by_id = {device.device_id: device for device in found}
    known = ", ".join(by_id) or "no device"
    problems = [
        Problem(f"the backend {backend} has no {entry.device_id!r} here; it has {known}", f"devices[{index}].device_id")
        for index, entry in enumerate(declared)
        if entry.device_id not in by_id
    ]
    if problems:
        raise ConfigError(problems)
    return [replace(by_id[entry.device_id], threads=entry.threads, cpus=entry.cpus) for entry in declared]
