"""The node as a whole: what the front, the dispatcher's client, the shutdown and the supervisor call.

`agent` builds and runs the parts. The node's own task only holds the background work that requests start.
"""

import logging
import math
import ssl
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import datetime
from functools import partial
from typing import Final, Protocol

import msgspec
import trio
from msgspec.structs import replace

from nodeagent import events, logs, loop_lag, reload
from nodeagent.access.gate import Gate
from nodeagent.config import ApiKeyConfig, ModelConfig, NodeConfig, read_api_keys
from nodeagent.containment import Containment
from nodeagent.devices.monitor import DeviceMonitor
from nodeagent.dispatcher.payloads import heartbeat, inventory, register
from nodeagent.dispatcher.wire import Heartbeat, Register
from nodeagent.errors import (
    BackendUnavailable,
    ConfigError,
    Draining,
    NoSuchDevice,
    OutOfDeviceMemory,
    Refusal,
    ReloadRefused,
    ShuttingDown,
)
from nodeagent.events import EventLog, Ring
from nodeagent.front.parameters import Parameters
from nodeagent.front.seam import ModelCard, ModelDetails, Reloaded
from nodeagent.histogram import Histogram
from nodeagent.llama_server.catalogue import Catalogue
from nodeagent.llama_server.command_line import model_arguments
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.server_id import ServerId
from nodeagent.llama_server.spans import misplaced, unknown_groups
from nodeagent.llama_server.tasks import task_of
from nodeagent.managed_device import ManagedDevice
from nodeagent.scheduling.lane import Lane
from nodeagent.scheduling.scheduler import Scheduler
from nodeagent.scheduling.seam import ServerState
from nodeagent.status import MODEL_ENDPOINTS, ModelStatus, NodeSnapshot, NodeState, NodeStatus, Phase, node_state
from supervisor.lifecycle import Event, Exited, Ready, Started

logger = logging.getLogger(__name__)

# Upper bounds of the buckets of `backend_load_s`: from a small model in the page cache to a large one on a slow disk.
LOADS_S: Final = (0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)


class Dispatcher(Protocol):
    """What the node needs of the dispatcher's client (`dispatcher.client.DispatcherClient`)."""

    @property
    def registered(self) -> bool: ...

    @property
    def accepted_at(self) -> float | None: ...

    def heartbeat_soon(self) -> None: ...

    def register_again(self) -> None: ...


class NodeIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What does not change while the agent runs.

    Other hosts reach the node at `base_url`, this host reaches it at `local_url`. `incarnation` is random for each
    start. `host_names` are those of this host that are known without a lookup.
    """

    base_url: str
    local_url: str
    incarnation: str
    started_at: datetime
    version: str
    host_names: frozenset[str] = frozenset()


class Node:
    """Implements `front.seam.Node` and `dispatcher.client.NodeSource`.

    `devices` are those of the node, and after them the groups of devices that models span.

    What changes: `_phase` in `enter`, `_config` in `reload`, `_last_state` in `_publish_state`, `_preloading` (the
    models that are to be ready before the node says so) in `preload` and `on_child_event`, `_drain_grace` (the time in
    which a drained node still accepts requests) in `drain`, `backend_exits`, `backend_load_s` (from a spawn to
    readiness) and `_started_at` in `on_child_event`; `_cards` in `cards`;
    `tls` in `reload`; `dispatcher`, `while_reloading` (entered for the time of a reload), `on_reload` (called with the
    new configuration) and `full_host_name` (with its domain; "" until it has been looked up) once, by `agent`.
    """

    def __init__(
        self,
        config: NodeConfig,
        identity: NodeIdentity,
        devices: Mapping[str, ManagedDevice],
        *,
        catalogue: Catalogue,
        monitor: DeviceMonitor,
        gate: Gate,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.identity = identity
        self.devices = devices
        self.scheduler: Scheduler[Upstream] = Scheduler(
            {device_id: device.lane for device_id, device in devices.items()},
            {device_id: device.servers for device_id, device in devices.items()},
        )
        self.events: EventLog = Ring(events.KEPT)
        self.dispatcher: Dispatcher | None = None
        self.while_reloading: Callable[[], AbstractContextManager[None]] = nullcontext
        self.on_reload: Callable[[NodeConfig], None] = lambda _config: None
        self.count_connections: Callable[[], Mapping[str, int]] = dict
        self._cards: list[ModelCard] = []
        self._cards_of: tuple[object, int] | None = None  # the models, and the changes of the catalogue
        self.backend_exits: Counter[tuple[str, str, str]] = Counter()
        self.backend_load_s = defaultdict[tuple[str, str], Histogram](partial(Histogram, LOADS_S))
        self._started_at: dict[str, float] = {}
        self.loop_lag_s = Histogram(loop_lag.BOUNDS_S)
        self.full_host_name = ""
        self._config = config
        self._catalogue = catalogue
        self._monitor = monitor
        self._gate = gate
        self.tls = tls
        self._phase = Phase.STARTING
        self._last_state: NodeState | None = None
        self._preloading: set[str] = set()
        self._preload_until = -math.inf
        self._drain_grace = trio.CancelScope()
        self._reloading = trio.Lock()
        self._containment = Containment("working in the background")
        self._background: trio.Nursery

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Own the background work that requests start (loads, unloads, reloads) until cancelled."""
        async with trio.open_nursery() as self._background:
            task_status.started()
            await trio.sleep_forever()

    @property
    def config(self) -> NodeConfig:
        return self._config

    # What the front calls (front.seam.Node).

    @property
    def node_id(self) -> str:
        return self._config.node_id

    @property
    def max_request_bytes(self) -> int:
        return self._config.max_request_bytes

    @property
    def gate(self) -> Gate:
        return self._gate

    @property
    def default_model_id(self) -> str | None:
        models = self._config.models
        marked = [model.model_id for model in models if model.default or len(models) == 1]
        return marked[0] if marked else None

    @property
    def stream_ping_s(self) -> float:
        return self._config.stream_ping_s

    @property
    def allow_remote_media(self) -> bool:
        return self._config.allow_remote_media

    @property
    def cors_origins(self) -> tuple[str, ...]:
        return self._config.cors_origins

    @property
    def has_page(self) -> bool:
        return self._config.page

    @property
    def host_names(self) -> Collection[str]:
        return {*self.identity.host_names, *self._config.allowed_hosts, self.full_host_name} - {""}

    def cards(self) -> list[ModelCard]:
        # Every request looks for its model here, so they are kept until the configuration or a model's file changes.
        models = self._config.models
        changes = self._catalogue.changes
        if self._cards_of is None or self._cards_of[0] is not models or self._cards_of[1] != changes:
            created = int(self.identity.started_at.timestamp())
            self._cards = [
                _card(model, created, task_of(model, self._catalogue.header(model.model_id))) for model in models
            ]
            self._cards_of = models, changes
        return self._cards

    def details(self, model_id: str) -> ModelDetails:
        [model] = [model for model in self._config.models if model.model_id == model_id]
        views = [view for device in self.devices.values() for view in device.servers.views()]
        own = [view for view in views if view.model_id == model_id]
        states = {view.state for view in own}
        is_loading = model_id in {device.lane.loads_now for device in self.devices.values()}
        header = self._catalogue.header(model_id)
        return ModelDetails(
            state="loaded" if ServerState.READY in states else "loading" if is_loading else "unloaded",
            failed=ServerState.FAILED in states,
            server=next((view.endpoint for view in own if view.endpoint is not None), None),
            ctx_size=model.ctx_size or (header.ctx_train if header else None),
            ctx_train=header.ctx_train if header else None,
            embedding_length=header.embedding_length if header else None,
            size_bytes=header.size_bytes if header else None,
            architecture=header.architecture if header else "",
            size_label=header.size_label if header else "",
            takes_images=model.mmproj is not None,
        )

    def state(self) -> NodeState:
        servers = [(device_id, device.servers.views()) for device_id, device in self.devices.items()]
        models = self._config.models
        places = sum(device.servers.serves(it.model_id) for device in self.devices.values() for it in models)
        state = node_state(self._phase, servers, len(models), places)
        if self._phase is Phase.SERVING and self._is_preloading():
            return replace(state, status=NodeStatus.STARTING)
        return state

    def inventory_json(self, *, for_operators: bool = False) -> bytes:
        return inventory(self.snapshot(with_fits=True), for_operators=for_operators).model_dump_json().encode()

    def log_of(self, device_id: str) -> Ring[str]:
        return self._device(device_id).lines

    async def load(self, model_id: str, device_id: str | None) -> str:
        self._refuse_if_ending("load a model")
        asked = self._span_with(model_id, device_id) or device_id
        for name, device in self.devices.items():
            if asked in (None, name) and device.servers.reset_failure(model_id):
                logger.info("%s: retrying %s, which had failed, at an operator's request", name, model_id)
        first = asked or self.scheduler.place_load(model_id)
        try:
            return await self._load_on(first, model_id)
        except OutOfDeviceMemory:
            if device_id is not None:
                raise
            with suppress(BackendUnavailable):
                other = self.scheduler.place_load(model_id)
                if other != first:
                    return await self._load_on(other, model_id)
            raise

    def load_soon(self, model_id: str, device_id: str | None) -> None:
        self._refuse_if_ending("load a model")
        self._background.start_soon(self._load_in_background, model_id, device_id, name=f"load {model_id}")

    async def unload(self, model_id: str, *, force: bool) -> list[str]:
        # A model that has failed has no server to stop; its failure is forgotten.
        devices = [
            device
            for device in self.devices.values()
            if device.servers.runs(model_id) or device.servers.reset_failure(model_id)
        ]
        async with trio.open_nursery() as nursery:
            for device in devices:
                name = f"unload {model_id} from {device.ref.device_id}"
                nursery.start_soon(partial(device.lane.unload, model_id, force=force), name=name)
        return [device.ref.device_id for device in devices]

    def drain(self) -> None:
        if self._phase is Phase.SERVING:
            grace_s, self._drain_grace = self._config.drain_grace_s, trio.CancelScope()
            logger.info("draining at an operator's request, accepting requests for %g s more", grace_s)
            self.enter(Phase.DRAINED)
            self._background.start_soon(self._refuse_after_grace, grace_s, self._drain_grace, name="drain")

    def undrain(self) -> None:
        self._refuse_if_ending("accept requests again")
        if self._phase is Phase.DRAINED:
            logger.info("accepting requests again at an operator's request")
            self._drain_grace.cancel()
            self.scheduler.accept_new()
            self.enter(Phase.SERVING)

    async def reload(self) -> Reloaded:
        # One at a time, in the order of the requests.
        async with self._reloading:
            with self.while_reloading():
                return await self._reload()

    def read_api_keys(self) -> dict[str, ApiKeyConfig]:
        """Every API key by its SHA-256. Blocks on the disk; raises ConfigError."""
        return read_api_keys(self._config)

    @property
    def connections(self) -> Mapping[str, int]:
        return self.count_connections()

    @property
    def dispatcher_state(self) -> tuple[bool, float | None] | None:
        if self.dispatcher is None:
            return None
        accepted_at = self.dispatcher.accepted_at
        return self.dispatcher.registered, None if accepted_at is None else trio.current_time() - accepted_at

    def register(self) -> bool:
        if self.dispatcher is None:
            return False
        self.dispatcher.register_again()
        return True

    # What the dispatcher's client calls (dispatcher.client.NodeSource).

    def register_payload(self) -> Register:
        return register(self.snapshot())

    def heartbeat_payload(self, sequence: int) -> Heartbeat:
        return heartbeat(self.snapshot(), sequence)

    def snapshot(self, *, with_fits: bool = False) -> NodeSnapshot:
        """Everything about the node now; how each model fits on each device only if it is asked for."""
        config, identity = self._config, self.identity
        models = [self._model_status(model) for model in config.models]
        if with_fits:
            fits = [device.fits([model.model_id for model in models]) for device in self.devices.values()]
            models = [
                replace(model, fits=tuple(its[model.model_id] for its in fits if model.model_id in its))
                for model in models
            ]
        return NodeSnapshot(
            now=trio.current_time(),
            node_id=config.node_id,
            node_name=config.node_name,
            base_url=identity.base_url,
            agent_version=identity.version,
            incarnation=identity.incarnation,
            started_at=identity.started_at,
            heartbeat_interval_s=config.heartbeat_interval_s,
            state=self.state(),
            devices=tuple(it.status(self._monitor) for it in self.devices.values() if not it.ref.members),
            models=tuple(models),
        )

    # What the agent and its shutdown call (shutdown.Drainable).

    @property
    def admitted(self) -> int:
        """Requests in flight or queued on the whole node."""
        return self.scheduler.admitted

    def preload(self) -> None:
        """Load the models with `preload`. Until they are ready or have failed, for at most `preload_ready_timeout_s`,
        the node's status is STARTING: a load balancer sends no requests, but those that come are served."""
        wanted = [model.model_id for model in self._config.models if model.preload]
        without_device = self.scheduler.preload(wanted)
        for model_id in without_device:
            logger.warning("model %s is not preloaded: no free device can run it", model_id)
        self._preloading = set(wanted) - set(without_device)
        self._preload_until = trio.current_time() + self._config.preload_ready_timeout_s

    def enter(self, phase: Phase) -> None:
        """Begin another phase, and publish the status that follows from it."""
        self._phase = phase
        self.scheduler.hold_preloads(held=self._is_draining)
        self._publish_state()

    def begin_shutdown(self) -> None:
        """Report that the node is shutting down, while requests are still accepted; an operator can't undo it."""
        self._drain_grace.cancel()
        self.enter(Phase.SHUTTING_DOWN)

    def refuse_requests(self) -> None:
        """Refuse new requests: the node is about to stop."""
        self.scheduler.refuse_new(Draining(self._config.shutdown_timeout_s))

    def reload_soon(self) -> None:
        """Reload in the background; the result is logged."""
        self._background.start_soon(self._reload_in_background, name="reload the configuration")

    # What the supervisor calls.

    def may_restart(self, child_id: str) -> bool:
        """Whether a server that has ended may be started again: while the node drains, only for a request that waits
        for its model."""
        server = ServerId.parse(child_id)
        if not self._is_draining or server.model_id in self.devices[server.device_id].lane.wanted:
            return True
        logger.info("%s is not restarted: the node drains, and no request waits for it", child_id)
        return False

    def on_child_event(self, event: Event) -> None:
        """Handle one transition of a server: its device first, then the event log, the dispatcher last."""
        server = ServerId.parse(event.child_id)
        self.devices[server.device_id].handle(event)
        self.events.append(events.of_child(event))
        device_id = self.devices[server.device_id].ref.parts[0].device_id  # of several, the first
        if isinstance(event, Exited):
            self.backend_exits[device_id, server.model_id, event.exit.cause.value] += 1
        elif isinstance(event, Started):
            self._started_at[event.child_id] = event.at
        elif isinstance(event, Ready):
            took_s = event.at - self._started_at[event.child_id]
            self.backend_load_s[device_id, server.model_id].observe(took_s)
        self._preloading -= self._models_in(ServerState.READY)  # one that is unloaded later was ready all the same
        self._publish_state()

    def on_child_line(self, child_id: str, generation: int, line: str) -> None:
        """Keep and log a line that a server printed."""
        server = ServerId.parse(child_id)
        self.devices[server.device_id].lines.append(line)
        logs.child_line(server.device_id, server.model_id, generation, line)

    # Inside.

    async def _reload(self) -> Reloaded:
        try:
            again = await trio.to_thread.run_sync(reload.read_again, self._config)
            refs = [device.ref for device in self.devices.values()]
            if problems_of_devices := misplaced(again.config, refs) or unknown_groups(again.config, refs):
                raise ConfigError(problems_of_devices)
        except ConfigError as error:
            problems = [str(problem) for problem in error.problems]
            logger.error("configuration not reloaded, the old one stays in effect: %s", "; ".join(problems))
            raise ReloadRefused(problems) from error
        self._gate.replace(again.keys)
        if (again.tls is None) == (self.tls is None):  # else clients would have another kind of address
            self.tls = again.tls
        return await self._reconfigure(again.config)

    async def _reconfigure(self, config: NodeConfig) -> Reloaded:
        """Apply another configuration; what it does not change goes on as it is."""
        reload.log_warnings(config)
        await self._catalogue.inspect_all(config.models)
        # Nothing is awaited from here on, so no request sees half of the change.
        what = reload.compare(self._config, config)
        self._config = reload.merge(self._config, config)
        for device_id, device in self.devices.items():
            for model_id in device.reconfigure(self._config):
                # In the background: requests in flight on the old server may take their time.
                name = f"unload {model_id} from {device_id}"
                self._background.start_soon(device.lane.unload, model_id, name=name)
        self.on_reload(self._config)
        logger.info("configuration reloaded: %s", what)
        if self.dispatcher is not None:
            self.dispatcher.register_again()
        return what

    @property
    def _is_draining(self) -> bool:
        return self._phase in (Phase.DRAINED, Phase.SHUTTING_DOWN, Phase.STOPPING)

    def _refuse_if_ending(self, order: str) -> None:
        if self._phase in (Phase.SHUTTING_DOWN, Phase.STOPPING):
            raise ShuttingDown(order)

    async def _refuse_after_grace(self, grace_s: float, grace: trio.CancelScope) -> None:
        """Load balancers need time to notice that the node drains."""
        with grace:
            await trio.sleep(grace_s)
            await trio.lowlevel.checkpoint_if_cancelled()  # an `undrain` at this very moment comes first
            self.scheduler.refuse_new(Draining(self._config.shutdown_timeout_s, by_operator=True))

    async def _reload_in_background(self) -> None:
        with self._containment, suppress(ReloadRefused):  # `reload` has logged it, and nobody waits for the result
            await self.reload()

    async def _load_in_background(self, model_id: str, device_id: str | None) -> None:
        with self._containment:
            try:
                await self.load(model_id, device_id)
            except Refusal as refusal:
                logger.warning("loading %s: %s", model_id, refusal)

    async def _load_on(self, device_id: str, model_id: str) -> str:
        ticket = self._lane(device_id).request_load(model_id)
        try:
            return (await ticket.granted()).device_id
        finally:
            ticket.close()

    def _device(self, device_id: str) -> ManagedDevice:
        if device_id not in self.devices:
            raise NoSuchDevice(device_id, list(self.devices))
        return self.devices[device_id]

    def _span_with(self, model_id: str, device_id: str | None) -> str | None:
        """The devices that the model spans, if this is one of them."""
        spans = [device for device in self.devices.values() if device.ref.members and device.servers.serves(model_id)]
        found = (it for it in spans if device_id in [part.device_id for part in it.ref.members])
        return next((it.ref.device_id for it in found), None)

    def _lane(self, device_id: str) -> Lane[Upstream]:
        return self._device(device_id).lane

    def _models_in(self, *states: ServerState) -> set[str]:
        """The models with a server in one of these states on any device."""
        views = (view for device in self.devices.values() for view in device.servers.views())
        return {view.model_id for view in views if view.state in states}

    def _is_preloading(self) -> bool:
        if not self._preloading or trio.current_time() >= self._preload_until:
            return False
        return bool(self._preloading - self._models_in(ServerState.READY, ServerState.FAILED))

    def _publish_state(self) -> None:
        """Something changed: record the node's state if it is another one, and send a heartbeat soon."""
        state = self.state()
        if state != self._last_state:
            self._last_state = state
            self.events.append(events.of_node(state.status.value, state.reasons, state.reason_codes))
        if self.dispatcher is not None:
            self.dispatcher.heartbeat_soon()

    def _model_status(self, model: ModelConfig) -> ModelStatus:
        header = self._catalogue.header(model.model_id)
        loads = [device.lane.times.measured_load_s(model.model_id) for device in self.devices.values()]
        return ModelStatus(
            model_id=model.model_id,
            aliases=model.names,
            roles=tuple(model.roles),
            endpoints=MODEL_ENDPOINTS[task_of(model, header) or "chat"],
            parallel=model.parallel,
            path=str(model.path),
            arguments=model_arguments(model, header),
            ctx_size=model.ctx_size or (header.ctx_train if header else None),
            size_bytes=header.size_bytes if header else None,
            problem=self._catalogue.problem(model.model_id),
            load_time_s=min((load_s for load_s in loads if load_s is not None), default=None),
        )


def _card(model: ModelConfig, created: int, task: str | None) -> ModelCard:
    return ModelCard(
        model.model_id,
        model.names,
        created,
        task,
        roles=tuple(model.roles),
        fallback=model.fallback,
        parameters=Parameters.of(model.defaults, model.overrides),
        max_request_bytes=model.max_request_bytes,
    )
