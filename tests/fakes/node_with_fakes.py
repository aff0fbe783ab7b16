"""The real node, with its devices, lanes and supervisor, over fake processes: for virtual time."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import trio

from fakes.child_process import FakeSpawner, Fate, FateProbe
from nodeagent.access.gate import Gate
from nodeagent.config import ModelConfig, NodeConfig, load_config
from nodeagent.devices.backend import Backend
from nodeagent.devices.monitor import DeviceMonitor
from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.llama_server.catalogue import Catalogue
from nodeagent.llama_server.device_servers import DeviceServers
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.saved_caches import SavedCaches
from nodeagent.llama_server.spans import spans_of
from nodeagent.managed_device import Part, manage
from nodeagent.node import Node, NodeIdentity
from nodeagent.scheduling.lease import Ticket
from nodeagent.scheduling.seam import ServerState
from nodeagent.status import Phase
from supervisor.lifecycle import Event
from supervisor.probe import LivenessPolicy, ProcessView
from supervisor.restart import RestartPolicy
from supervisor.spec import ChildSpec
from supervisor.supervisor import Supervisor

NEVER_PROBED = LivenessPolicy(interval_s=math.inf)
STARTED_AT = datetime(2026, 11, 23, 18, 7, 11, tzinfo=UTC)


class PortProbe(FateProbe):
    """The address that it returns has a port, as a server's has."""

    async def check(self, process: ProcessView) -> str:
        await super().check(process)
        return f"127.0.0.1:{process.generation}"


class FakeCatalogue(Catalogue):
    """Nothing is read: a model's file can be used unless `unusable` says why not, by model id."""

    def __init__(self) -> None:
        super().__init__()
        self.unusable: dict[str, str] = {}

    def problem(self, model_id: str) -> str | None:
        return self.unusable.get(model_id)

    async def inspect(self, model: ModelConfig) -> str | None:
        return self.problem(model.model_id)


class FakeDispatcherClient:
    """Remembers what the node called."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.registered = False
        self.accepted_at: float | None = None

    def heartbeat_soon(self) -> None:
        self.calls.append("heartbeat_soon")

    def register_again(self) -> None:
        self.calls.append("register_again")


class NodeWithFakes:
    """A node with the models `a` and `b`, serving once `start` has returned; its processes get `fates` in turn.

    `write_config` changes the file that it is configured by.
    """

    def __init__(
        self,
        folder: Path,
        fates: Iterable[Fate | OSError] = (),
        *,
        device_ids: Iterable[str] = ("cpu:0",),
        liveness: LivenessPolicy = NEVER_PROBED,
        **keys: Any,
    ) -> None:
        self.file = folder / "node.yaml"
        binary = folder / "llama-server"
        binary.touch(mode=0o755)
        self._keys: dict[str, Any] = {
            "node_id": "box",
            "state_dir": str(folder / "state"),
            "llama_server_bin": str(binary),
            "models": [{"model_id": "a", "path": "a.gguf"}, {"model_id": "b", "path": "b.gguf"}],
        }
        self.config = self.write_config(**keys)
        self.spawner = FakeSpawner(fates)
        self.supervisor = Supervisor(
            on_event=self._on_event, on_line=self._on_line, may_restart=self._may_restart, spawner=self.spawner
        )
        self.catalogue = FakeCatalogue()
        self._liveness = liveness
        self._probe = PortProbe()
        refs = [
            DeviceRef(
                device_id=device_id,
                backend="cpu" if device_id.startswith("cpu") else "vulkan",
                index=index,
                name=f"CPU {index}",
            )
            for index, device_id in enumerate(device_ids)
        ]
        self._monitor = DeviceMonitor(cast(Backend, None), refs, settle_max_s=1, read=_nothing)
        spans = spans_of(self.config, refs)
        caches = SavedCaches(folder / "kv")
        devices = manage(
            [self._part(ref, caches, spans) for ref in refs], [self._part(ref, caches) for ref in spans], self.config
        )
        self.gate = Gate("token", self.config.state_dir, {})
        self.node = Node(
            self.config, IDENTITY, devices, catalogue=self.catalogue, monitor=self._monitor, gate=self.gate
        )

    def write_config(self, **keys: Any) -> NodeConfig:
        """Write the file anew with these keys changed, and read it."""
        self._keys |= keys
        self.file.write_text(json.dumps(self._keys))
        return load_config(self.file)

    async def start(self, nursery: trio.Nursery) -> Node:
        await nursery.start(self.supervisor.run, name="supervisor")
        await nursery.start(self.node.run, name="node")
        for device_id, device in self.node.devices.items():
            await nursery.start(device.lane.run, name=f"lane {device_id}")
        self.node.enter(Phase.SERVING)
        return self.node

    def event_kinds(self) -> list[str]:
        return [event.kind for event in self.node.events.after(0).items]

    def _part(self, ref: DeviceRef, caches: SavedCaches, spans: Sequence[DeviceRef] = ()) -> Part:
        build_specs = partial(self._specs, ref)
        servers = DeviceServers(
            ref,
            {model.model_id: model for model in self.config.models},
            build_specs(self.config),
            "key",
            supervisor=self.supervisor,
            catalogue=self.catalogue,
            monitor=self._monitor,
            hooks=caches,
            patience_s=self.config.llama_server_startup_timeout_s,
            spans=spans,
        )
        return Part(ref, servers, build_specs)

    def _specs(self, ref: DeviceRef, config: NodeConfig) -> Mapping[str, ChildSpec]:
        return {
            model.model_id: ChildSpec(
                child_id=f"{ref.device_id}/{model.model_id}",
                group=ref.device_id,
                argv=("llama-server", model.model_id, str(model.ctx_size)),
                env={},
                probe=self._probe,
                start_timeout_s=config.llama_server_startup_limit_s,
                liveness=self._liveness,
                restart=RestartPolicy(max_restarts=config.restart.max_restarts, cooldown_s=config.restart.cooldown_s),
            )
            for model in config.models
        }

    def _on_event(self, event: Event) -> None:
        self.node.on_child_event(event)

    def _may_restart(self, child_id: str) -> bool:
        return self.node.may_restart(child_id)

    def _on_line(self, child_id: str, generation: int, line: str) -> None:
        self.node.on_child_line(child_id, generation, line)


async def _nothing(_device: DeviceRef, now: float) -> DeviceMetrics:
    return DeviceMetrics(measured_at=now)


IDENTITY = NodeIdentity(
    base_url="http://10.0.0.5:8081",
    local_url="http://127.0.0.1:8081",
    incarnation="b1d0",
    started_at=STARTED_AT,
    version="1.2.3",
)


def loaded(node: Node) -> list[str]:
    """Every ready server, as `device/model`."""
    return [
        f"{device_id}/{server.model_id}"
        for device_id, device in node.devices.items()
        for server in device.servers.views()
        if server.state is ServerState.READY
    ]


async def request_in_flight(node: Node, model_id: str) -> Ticket[Upstream]:
    """A request that was admitted and granted; the caller closes it."""
    ticket = node.scheduler.admit("request", model_id)
    await ticket.granted()
    return ticket
