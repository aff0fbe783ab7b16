"""The servers of one device over the real supervisor and fake processes, with fakes of all that is around them."""

import math
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from fakes.child_process import FakeProcess, FakeSpawner, Fate, FateProbe
from nodeagent.config import ModelConfig
from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.errors import BackendUnavailable
from nodeagent.gguf.cache_shape import CacheShape
from nodeagent.gguf.header import GgufHeader
from nodeagent.llama_server.device_servers import DeviceServers
from nodeagent.llama_server.relay import Upstream
from nodeagent.scheduling.seam import ServerState, ServerView
from supervisor.probe import LivenessPolicy, ProcessView
from supervisor.restart import RestartPolicy
from supervisor.spec import ChildSpec
from supervisor.supervisor import Supervisor

GIB = 2**30
NEVER_READY = Fate(ready_after_s=None)
CRASHES = Fate(ready_after_s=None, exits_after_s=1.0)


class PortProbe(FateProbe):
    """Its addresses have a port, as those of servers have."""

    async def check(self, process: ProcessView) -> str:
        await super().check(process)
        return f"127.0.0.1:{process.generation}"


PROBE = PortProbe()


def model(model_id: str, **keys: Any) -> ModelConfig:
    return ModelConfig(model_id=model_id, path=Path(f"/m/{model_id}.gguf"), **keys)


def spec(model_id: str, *, argument: str = "", max_restarts: int = 2) -> ChildSpec:
    return ChildSpec(
        child_id=f"cpu:0/{model_id}",
        group="cpu:0",
        argv=("llama-server", model_id, argument),
        env={},
        probe=PROBE,
        start_timeout_s=20,
        liveness=LivenessPolicy(interval_s=math.inf),
        restart=RestartPolicy(max_restarts=max_restarts, cooldown_s=100),
    )


def header(layers: int = 10, size_bytes: int = 4 * GIB) -> GgufHeader:
    return GgufHeader(
        size_bytes=size_bytes,
        layers=layers,
        ctx_train=4096,
        embedding_length=64,
        cache=CacheShape(keys=(8 * 128,) * layers, values=(8 * 128,) * layers, windowed=(False,) * layers),
    )


class Files:
    """Implements `seams.ModelFiles`; each inspection takes `takes_s`."""

    def __init__(self) -> None:
        self.headers: dict[str, GgufHeader] = {}
        self.problems: dict[str, str] = {}
        self.takes_s = 0.0

    def header(self, model_id: str) -> GgufHeader | None:
        return self.headers.get(model_id)

    def problem(self, model_id: str) -> str | None:
        return self.problems.get(model_id)

    async def inspect(self, model: ModelConfig) -> str | None:
        await trio.sleep(self.takes_s)
        return self.problem(model.model_id)


class Readings:
    """Implements `seams.DeviceReadings`; with `free_now` each reading is up to date."""

    def __init__(self) -> None:
        self.free_bytes: int | None = None
        self.measured_at = 0.0
        self.is_read = False
        self.settled_at: list[float] = []
        self.free_now: Callable[[], int] | None = None

    def latest(self, device_id: str) -> DeviceMetrics | None:
        if self.free_now is not None:
            return DeviceMetrics(measured_at=trio.current_time(), memory_free_bytes=self.free_now())
        return DeviceMetrics(measured_at=self.measured_at, memory_free_bytes=self.free_bytes) if self.is_read else None

    async def settled(self, device_id: str) -> None:
        self.settled_at.append(trio.current_time())


class Measured:
    """Implements `seams.Measurements`, by model id."""

    def __init__(self) -> None:
        self.changes = 0
        self.bytes: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.least: dict[str, int] = {}

    def memory_bytes(self, model: ModelConfig, spec: ChildSpec) -> int | None:
        return self.bytes.get(model.model_id)

    def least_bytes(self, model: ModelConfig, spec: ChildSpec) -> int | None:
        return self.least.get(model.model_id)

    def ran_out(self, model: ModelConfig, spec: ChildSpec, least_bytes: int | None) -> None:
        self.changes += 1
        if least_bytes is None:
            self.least.pop(model.model_id, None)
        else:
            self.least[model.model_id] = least_bytes

    def load_s(self, model: ModelConfig, spec: ChildSpec) -> float | None:
        return self.seconds.get(model.model_id)


class Hooks:
    """Implements `seams.ServerHooks`; `calls` lists what was called. `ready_takes_s` None: there is nothing to do."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.ready_takes_s: float | None = None
        self.error: OSError | None = None

    def before_start(self, model: ModelConfig, spec: ChildSpec) -> bool:
        self.calls.append(f"before_start {model.model_id}")
        if self.error is not None:
            raise self.error
        return self.ready_takes_s is not None

    async def after_ready(self, model: ModelConfig, spec: ChildSpec, upstream: Upstream) -> None:
        self.calls.append(f"after_ready {model.model_id} at {upstream.address}")
        await trio.sleep(self.ready_takes_s or 0.0)

    def after_start(self, spec: ChildSpec) -> None:
        self.calls.append(f"after_start {spec.child_id}")

    async def before_stop(self, model: ModelConfig, spec: ChildSpec, upstream: Upstream) -> None:
        self.calls.append(f"before_stop {model.model_id} at {upstream.address}")


class Device:
    """The servers of a device with the models `a` and `b`; its processes get `fates` in turn."""

    def __init__(self, fates: Iterable[Fate | OSError], *, backend: str, patience_s: float, **keys: Any) -> None:
        self.spawner = FakeSpawner(fates)
        self.supervisor = Supervisor(spawner=self.spawner, on_event=lambda event: self.servers.handle(event))
        self.files, self.readings, self.hooks = Files(), Readings(), Hooks()
        self.measured = Measured()
        self.models = {"a": model("a", **keys), "b": model("b", **keys)}
        self.specs = {"a": spec("a"), "b": spec("b")}
        self.patience_s = patience_s
        self.servers = DeviceServers(
            DeviceRef(device_id="cpu:0", backend=backend, index=0, name="device", memory_total_bytes=8 * GIB),
            self.models,
            self.specs,
            "key",
            supervisor=self.supervisor,
            catalogue=self.files,
            monitor=self.readings,
            hooks=self.hooks,
            patience_s=patience_s,
            measurements=self.measured,
            max_models=2,
        )

    @property
    def process(self) -> FakeProcess:
        """The last process."""
        return self.spawner.processes[-1]

    def view(self, model_id: str = "a") -> ServerView[Upstream]:
        [view] = [view for view in self.servers.views() if view.model_id == model_id]
        return view

    def upstream(self, model_id: str = "a") -> Upstream:
        endpoint = self.view(model_id).endpoint
        assert endpoint is not None
        return endpoint

    async def refused(self, model_id: str = "a") -> BackendUnavailable:
        with pytest.raises(BackendUnavailable) as caught:
            await self.servers.ensure(model_id)
        return caught.value

    async def give_up_on(self, model_id: str = "a") -> None:
        """Return once the supervisor has given up on a model whose processes all crash; it has not cooled down yet."""
        await self.refused(model_id)
        await trio.sleep(30)
        assert self.view(model_id).state is ServerState.FAILED


@asynccontextmanager
async def running_device(
    *fates: Fate | OSError, backend: str = "cpu", patience_s: float = 1000.0, **keys: Any
) -> AsyncIterator[Device]:
    device = Device(fates, backend=backend, patience_s=patience_s, **keys)
    async with trio.open_nursery() as nursery:
        await nursery.start(device.supervisor.run)
        yield device
        nursery.cancel_scope.cancel()
