"""What the agent asks of a vendor's devices: which there are, how they are, and how a child is kept to one of them.

DriverError(NodeAgentError)    the vendor's driver gives no answer; never leaves `nodeagent.backends`
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.errors import ConfigError, NodeAgentError, Problem


class DriverError(NodeAgentError):
    """The driver, or one device of it, gives no answer.

    `absent` is True where there is no driver at all, as on any host without such devices: nothing is broken then.
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
    """One vendor's devices. Everything here blocks on drivers, for seconds at worst: call it in a thread.

    Whoever made it closes it.
    """

    @property
    def name(self) -> str:
        """As in the configuration: `cpu`, `cuda`."""
        ...

    def discover(self) -> list[DeviceRef]:
        """The devices that this process may use. Raises StartupError where the driver gives no answer."""
        ...

    def devices(self, declared: Sequence[DeclaredDevice]) -> list[DeviceRef]:
        """The declared devices in their order, with what is declared of them; all there are where none is declared.

        Raises ConfigError naming each that isn't there, StartupError where the driver gives no answer.
        """
        ...

    def read(self, device: DeviceRef, now: float) -> DeviceMetrics:
        """Measure the device; `now` becomes `measured_at`. What can't be measured is None; it raises nothing."""
        ...

    def child_env(self, device: DeviceRef) -> dict[str, str]:
        """The variables that keep a child to this device, on top of the inherited environment."""
        ...

    def child_args(self, device: DeviceRef) -> list[str]:
        """The arguments to llama-server that do the same."""
        ...

    def close(self) -> None:
        """Let go of the driver; nothing else is called after it. Does not block."""
        ...


def as_declared(found: Sequence[DeviceRef], declared: Sequence[DeclaredDevice], backend: str) -> list[DeviceRef]:
    """Those of the devices found that are declared, with their threads and CPUs. Raises ConfigError."""
    by_id = {device.device_id: device for device in found}
    here = ", ".join(by_id) or "no device"
    problems = [
        Problem(f"the backend {backend} has no {entry.device_id!r} here; it has {here}", f"devices[{index}].device_id")
        for index, entry in enumerate(declared)
        if entry.device_id not in by_id
    ]
    if problems:
        raise ConfigError(problems)
    return [replace(by_id[entry.device_id], threads=entry.threads, cpus=entry.cpus) for entry in declared]
