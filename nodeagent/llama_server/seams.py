"""What `DeviceServers` needs of the parts around it; the tests implement each with a fake."""

from typing import Protocol

from nodeagent.config import ModelConfig
from nodeagent.devices.values import DeviceMetrics
from nodeagent.gguf.header import GgufHeader
from nodeagent.llama_server.relay import Upstream
from supervisor.spec import ChildSpec


class ModelFiles(Protocol):
    """What is known of the model files; see `Catalogue`."""

    def header(self, model_id: str) -> GgufHeader | None: ...

    def problem(self, model_id: str) -> str | None: ...

    async def inspect(self, model: ModelConfig) -> str | None: ...


class DeviceReadings(Protocol):
    """What was measured on the devices; see `DeviceMonitor`."""

    def latest(self, device_id: str) -> DeviceMetrics | None: ...

    async def settled(self, device_id: str) -> None: ...


class Measurements(Protocol):
    """What earlier loads took, with the same arguments on the same device; see `LoadMeter`."""

    @property
    def changes(self) -> int:
        """Rises when there is another measurement."""

    def memory_bytes(self, model: ModelConfig, spec: ChildSpec) -> int | None:
        """The memory that the server took of the device, None if it was never measured."""

    def least_bytes(self, model: ModelConfig, spec: ChildSpec) -> int | None:
        """How much of the device's memory must be free at least, by a load that ran out of it; None if none did."""

    def ran_out(self, model: ModelConfig, spec: ChildSpec, least_bytes: int | None) -> None:
        """A load ran out of the device's memory, and needs at least so much of it. None: forget that."""

    def load_s(self, model: ModelConfig, spec: ChildSpec) -> float | None:
        """How long it took from its spawn until it was ready, None if it was never measured."""


class ServerHooks(Protocol):
    """What else is done when a server is started or stopped.

    For each start `before_start` is called, then `after_ready` if the server became ready, then `after_start`.
    """

    def before_start(self, model: ModelConfig, spec: ChildSpec) -> bool:
        """Prepare the start; return whether `after_ready` has work to do.

        If so, the server counts as starting until that is done. An OSError fails the start.
        """

    async def after_ready(self, model: ModelConfig, spec: ChildSpec, upstream: Upstream) -> None:
        """The server is ready."""

    def after_start(self, spec: ChildSpec) -> None:
        """The start is over: the server is ready, or the start failed or was cancelled."""

    async def before_stop(self, model: ModelConfig, spec: ChildSpec, upstream: Upstream) -> None:
        """The server is ready and about to be stopped; it was started as it is configured now."""
