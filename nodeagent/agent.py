"""The composition root: builds the node from its configuration and runs it from start to stop.

lock the state folder, bind the address, find the devices
├── supervisor      owns the children
├── monitor         reads the devices
├── lanes           one task per device
├── front           hypercorn and the Quart-Trio app
├── dispatcher      tells the mesh about the node
└── signals         drain, then stop: the front first, the children last
"""

import logging
import os
import secrets
import signal
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import trio

from nodeagent import events, launch, logs, stall, state_folder
from nodeagent.backends import select
from nodeagent.backends.base import Backend
from nodeagent.catalogue import Catalogue
from nodeagent.config import ModelConfig, NodeConfig, find_llama_server, load_config, read_token, with_keys
from nodeagent.devices import DeviceRef
from nodeagent.dispatcher.client import DispatcherClient, loopback_warning
from nodeagent.dispatcher.payloads import heartbeat, inventory, register
from nodeagent.dispatcher.wire import Heartbeat, Register
from nodeagent.errors import ConfigError, Draining, NoSuchDevice, Problem, Refusal, ReloadRefused
from nodeagent.events import EventLog
from nodeagent.front.app import create_app
from nodeagent.front.asgi import Front
from nodeagent.front.openai import ENDPOINTS
from nodeagent.front.seam import ModelCard, Reloaded
from nodeagent.front.server import bind, serve
from nodeagent.kept_kv import KeptKv
from nodeagent.monitor import DeviceMonitor
from nodeagent.ring import Ring
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.queueing import FirstCome
from nodeagent.scheduling.scheduler import Scheduler
from nodeagent.scheduling.swap_aware import SwapAware
from nodeagent.servers import DeviceServers
from nodeagent.status import DeviceStatus, ModelStatus, NodeSnapshot, NodeState, NodeStatus, judge
from nodeagent.upstream import LlamaServerProbe, Upstream
from supervisor.lifecycle import Event
from supervisor.records import Records, sweep
from supervisor.spec import ChildSpec
from supervisor.supervisor import Supervisor

logger = logging.getLogger(__name__)

# The log of what could still run after the children are gone, and the exit itself, take less than this; a client that
# reads nothing, or a driver that hangs, must not keep the process from ending.
_LAST_RESORT_S = 15.0
# Once the drain is over, answers under way are cut; this is for the last bytes of those that just ended.
_LAST_BYTES_S = 1.0
_IDLE_LOOK_S = 0.05
_LINES_KEPT = 2000

# Keys that what already runs was built on: another value needs a restart of the agent.
_FIXED_KEYS = (
    "listen_host",
    "listen_port",
    "node_id",
    "node_name",
    "state_dir",
    "dispatcher_base_url",
    "dispatcher_token_file",
    "advertise_url",
    "heartbeat_interval_s",
    "llama_server_bin",
    "memory_settle_timeout_s",
    "max_request_bytes",
    "backend",
    "devices",
)


async def run(config: NodeConfig, *, on_ready: Callable[[str], None] = lambda _base_url: None) -> None:
    """Run the node until SIGTERM or SIGINT has been obeyed; `on_ready` is told the base URL once requests are taken.

    Raises ConfigError or StartupError, before any child was started, if the node can't run here. Cancelling stops
    the children and returns.
    """
    binary = find_llama_server(config)
    _warn_of_supervisord()
    with state_folder.locked(config.state_dir):
        sweep(state_folder.children_file(config.state_dir))
        listeners, port = await bind(config.listen_host, config.listen_port)
        backend = await trio.to_thread.run_sync(select, config.backend, config.devices)
        try:
            # In threads: drivers can take long to answer.
            devices = await trio.to_thread.run_sync(backend.devices, config.devices)
            node = AgentNode(config, backend, devices, binary, port)
            state_folder.say_address(config.state_dir, node.local_url)
            await node.run(listeners, on_ready)
        finally:
            backend.close()


class AgentNode:
    """The node: everything that runs, and what the front and the dispatcher ask of it (`front.seam.Node`).

    What changes: `_phase` and `_last_resort` in `run` and what it calls, and in `drain` and `undrain`; `_config` in
    `reload`; `_told` in `_tell_state`.
    """

    def __init__(self, config: NodeConfig, backend: Backend, devices: list[DeviceRef], binary: Path, port: int) -> None:
        self._config = config
        self._backend = backend
        self._binary = binary
        self._phase = NodeStatus.STARTING
        self._drained_by_operator = False
        self.admin_token = state_folder.admin_token(config.state_dir)
        self.local_url = _base_url(_reachable_here(config.listen_host), port)
        self.events: EventLog = Ring(events.KEPT)
        self._told: NodeState | None = None
        self._logs: dict[str, Ring[str]] = {device.device_id: Ring(_LINES_KEPT) for device in devices}
        self._api_keys = {device.device_id: secrets.token_urlsafe(32) for device in devices}
        self._incarnation = uuid.uuid4().hex
        self._started_at = datetime.now(UTC)
        self._base_url = config.advertise_url or _base_url(config.listen_host, port)
        self._reloading = trio.Lock()
        self._front_shuts = trio.Event()
        self._front_ended = trio.Event()
        self._last_resort: threading.Timer | None = None
        self._nursery: trio.Nursery
        records = Records(state_folder.children_file(config.state_dir))
        self._supervisor = Supervisor(on_event=self._on_event, on_line=self._on_line, records=records)
        self._monitor = DeviceMonitor(backend, devices, settle_max_s=config.memory_settle_timeout_s)
        self._catalogue = Catalogue()
        self._kept_kv = KeptKv(state_folder.kv_folder(config.state_dir))
        self._hosts = {device.device_id: self._host(device) for device in devices}
        self._lanes = {device_id: Lane(device_id, host, _rules(config)) for device_id, host in self._hosts.items()}
        self.scheduler: Scheduler[Upstream] = Scheduler(self._lanes, self._hosts)
        self._dispatcher = self._dispatcher_client()

    async def run(self, listeners: list[trio.SocketListener], on_ready: Callable[[str], None]) -> None:
        """Run until told to stop by a signal, then drain, stop the children, and return."""
        await self._catalogue.inspect_all(self._config.models)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            signals = await nursery.start(_receive_signals)
            await nursery.start(self._supervisor.run)
            await nursery.start(self._monitor.run)
            for lane in self._lanes.values():
                await nursery.start(lane.run)
            nursery.start_soon(stall.watch, self._workers, self._supervisor.fail)
            self._preload()
            await nursery.start(self._serve_front, listeners)
            self._enter(NodeStatus.READY)
            if self._dispatcher is not None:
                await nursery.start(self._dispatcher.run)
            logger.info("node %s takes requests at %s", self.node_id, self._base_url)
            on_ready(self._base_url)
            await self._until_drained(signals)
            await self._stop()
            nursery.cancel_scope.cancel()  # the supervisor stops the children before its task ends
        self._kept_kv.clear()
        if self._last_resort is not None:
            self._last_resort.cancel()
        logger.info("node %s has stopped", self.node_id)

    # What the front asks (front.seam.Node).

    @property
    def node_id(self) -> str:
        return self._config.node_id

    @property
    def max_request_bytes(self) -> int:
        return self._config.max_request_bytes

    def cards(self) -> list[ModelCard]:
        created = int(self._started_at.timestamp())
        return [ModelCard(model.model_id, _aliases(model), created) for model in self._config.models]

    def state(self) -> NodeState:
        servers = [(device_id, host.views()) for device_id, host in self._hosts.items()]
        return judge(self._phase, servers, len(self._config.models))

    def inventory_json(self) -> bytes:
        return inventory(self.snapshot()).model_dump_json().encode()

    def log_of(self, device_id: str) -> Ring[str]:
        self._lane(device_id)
        return self._logs[device_id]

    async def load(self, model_id: str, device_id: str | None) -> str:
        for name, host in self._hosts.items():
            if device_id in (None, name) and host.forgive(model_id):
                logger.info("%s: %s had failed, and is tried again: an operator asked for it", name, model_id)
        lane = self._lane(device_id or self.scheduler.place_visit(model_id))
        ticket = lane.visit(model_id)
        try:
            return (await ticket.granted()).device_id
        finally:
            ticket.close()

    def load_soon(self, model_id: str, device_id: str | None) -> None:
        self._nursery.start_soon(self._load_for_nobody, model_id, device_id)

    async def unload(self, model_id: str, *, force: bool) -> list[str]:
        # Of one that has failed there is nothing to stop but its past.
        devices = [name for name, host in self._hosts.items() if host.runs(model_id) or host.forgive(model_id)]
        async with trio.open_nursery() as nursery:
            for device_id in devices:
                nursery.start_soon(partial(self._lanes[device_id].unload, model_id, force=force))
        return devices

    def drain(self) -> None:
        if self._phase is NodeStatus.READY:
            logger.info("draining: an operator asked for it")
            self._drained_by_operator = True
            self.scheduler.refuse_new(Draining(self._config.shutdown_timeout_s))
            self._enter(NodeStatus.DRAINING)

    def undrain(self) -> None:
        if self._drained_by_operator and self._phase is NodeStatus.DRAINING:
            logger.info("taking requests again: an operator asked for it")
            self._drained_by_operator = False
            self.scheduler.take_new()
            self._enter(NodeStatus.READY)

    async def reload(self) -> Reloaded:
        async with self._reloading:  # in the order in which they were asked for
            try:
                config = await trio.to_thread.run_sync(_read_again, self._config)
            except ConfigError as error:
                problems = [str(problem) for problem in error.problems]
                logger.error("the configuration is bad, the old one stays: %s", "; ".join(problems))
                raise ReloadRefused(problems) from error
            return await self._take_over(config)

    def register(self) -> bool:
        if self._dispatcher is None:
            return False
        self._dispatcher.register_again()
        return True

    # What the dispatcher's client asks (dispatcher.client.NodeSource).

    def register_payload(self) -> Register:
        return register(self.snapshot())

    def heartbeat_payload(self, sequence: int) -> Heartbeat:
        return heartbeat(self.snapshot(), sequence)

    def snapshot(self) -> NodeSnapshot:
        """Everything about the node now."""
        config = self._config
        return NodeSnapshot(
            now=trio.current_time(),
            node_id=config.node_id,
            node_name=config.node_name,
            base_url=self._base_url,
            agent_version=version("rolemesh-node-agent"),
            incarnation=self._incarnation,
            started_at=self._started_at,
            heartbeat_interval_s=config.heartbeat_interval_s,
            state=self.state(),
            devices=tuple(self._device_status(host) for host in self._hosts.values()),
            models=tuple(self._model_status(model) for model in config.models),
        )

    # Building.

    def _host(self, device: DeviceRef) -> DeviceServers:
        return DeviceServers(
            device,
            {model.model_id: model for model in self._config.models},
            self._specs(device, self._config),
            self._api_keys[device.device_id],
            supervisor=self._supervisor,
            catalogue=self._catalogue,
            monitor=self._monitor,
            kept_kv=self._kept_kv,
            patience_s=self._config.llama_server_startup_timeout_s,
        )

    def _specs(self, device: DeviceRef, config: NodeConfig) -> dict[str, ChildSpec]:
        # Its own key for each device and each start of the agent: nobody else on the host can use the children.
        api_key = self._api_keys[device.device_id]
        return {
            model.model_id: launch.child_spec(
                model,
                device,
                self._backend,
                self._binary,
                config=config,
                probe=LlamaServerProbe(model.server_name, api_key),
                api_key=api_key,
            )
            for model in config.models
        }

    def _dispatcher_client(self) -> DispatcherClient | None:
        config = self._config
        if config.dispatcher_base_url is None:
            return None
        warning = loopback_warning(self._base_url, config.dispatcher_base_url)
        if warning is not None:
            logger.warning("%s", warning)
        return DispatcherClient(
            config.dispatcher_base_url,
            token=read_token(config),
            node=self,
            heartbeat_interval_s=config.heartbeat_interval_s,
        )

    # Another configuration.

    async def _take_over(self, config: NodeConfig) -> Reloaded:
        """Make it the node's; what it does not change goes on as it is."""
        await self._catalogue.inspect_all(config.models)
        # From here on nothing is awaited: no request sees half of it.
        before = {model.model_id: model for model in self._config.models}
        after = {model.model_id: model for model in config.models}
        what = Reloaded(
            added=tuple(model_id for model_id in after if model_id not in before),
            changed=tuple(model_id for model_id in after if before.get(model_id, after[model_id]) != after[model_id]),
            removed=tuple(model_id for model_id in before if model_id not in after),
            needs_restart=tuple(key for key in _FIXED_KEYS if getattr(config, key) != getattr(self._config, key)),
        )
        fixed = {key: getattr(self._config, key) for key in _FIXED_KEYS}
        self._config = with_keys(config, fixed)
        for device_id, host in self._hosts.items():
            self._lanes[device_id].rules = _rules(config)
            specs = self._specs(host.device, self._config)
            for model_id in host.replace(after, specs, config.llama_server_startup_timeout_s):
                # In the background: requests in flight on the old server may take their time.
                self._nursery.start_soon(self._lanes[device_id].unload, model_id)
        logger.info("configuration reloaded: %s", what)
        if self._dispatcher is not None:
            self._dispatcher.register_again()
        return what

    async def _reload_on_signal(self) -> None:
        with suppress(ReloadRefused):  # it has been logged, and there is nobody to tell
            await self.reload()

    async def _load_for_nobody(self, model_id: str, device_id: str | None) -> None:
        try:
            await self.load(model_id, device_id)
        except Refusal as refusal:
            logger.warning("loading %s: %s", model_id, refusal)

    def _lane(self, device_id: str) -> Lane[Upstream]:
        if device_id not in self._lanes:
            raise NoSuchDevice(device_id, list(self._lanes))
        return self._lanes[device_id]

    # Running.

    async def _serve_front(self, listeners: list[trio.SocketListener], *, task_status: trio.TaskStatus[None]) -> None:
        front = Front(create_app(self), max_request_bytes=self._config.max_request_bytes, node_id=self.node_id)
        try:
            await serve(
                front,
                listeners,
                shutdown=self._front_shuts,
                graceful_timeout_s=_LAST_BYTES_S,
                task_status=task_status,
            )
        finally:
            self._front_ended.set()

    def _preload(self) -> None:
        wanted = [model.model_id for model in self._config.models if model.preload]
        for model_id in self.scheduler.preload(wanted):
            logger.warning("model %s is not preloaded: no device is left for it", model_id)

    def _on_event(self, event: Event) -> None:
        """One transition of a child: the supervisor has logged it; whoever depends on it looks again."""
        device_id, _, _model_id = event.child_id.partition("/")
        self._hosts[device_id].handle(event)
        self._lanes[device_id].nudge()
        self.events.append(events.of_child(event))
        self._tell_state()

    def _workers(self) -> list[stall.Worker]:
        timeout_s = self._config.stall_timeout_s
        return [worker for host in self._hosts.values() for worker in host.workers(timeout_s)]

    def _on_line(self, child_id: str, generation: int, line: str) -> None:
        device_id, _, model_id = child_id.partition("/")
        self._logs[device_id].append(line)
        logs.child_line(device_id, model_id, generation, line)

    def _enter(self, phase: NodeStatus) -> None:
        self._phase = phase
        self._tell_state()

    def _tell_state(self) -> None:
        """Something changed: say so to the dispatcher, and to those who listen if it changed the node's own state."""
        state = self.state()
        if state != self._told:
            self._told = state
            self.events.append(events.of_node(state.status.value, state.reasons))
        if self._dispatcher is not None:
            self._dispatcher.notice()

    # Stopping.

    async def _until_drained(self, signals: AsyncIterator[int]) -> None:
        """Return when a signal asked for the end and the work under way is done, given up on, or cut by a second."""
        signum = await self._next_end(signals)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._drain, signal.Signals(signum), nursery.cancel_scope)
            signum = await self._next_end(signals)
            logger.warning(
                "%s again: not waiting for %d requests", signal.Signals(signum).name, self.scheduler.admitted
            )
            nursery.cancel_scope.cancel()

    async def _next_end(self, signals: AsyncIterator[int]) -> int:
        """The next signal that asks for the end; those that ask for a reload are obeyed on the way."""
        while (signum := await anext(signals)) == signal.SIGHUP:
            logger.info("SIGHUP: reloading the configuration")
            self._nursery.start_soon(self._reload_on_signal)
        return signum

    async def _drain(self, asked_by: signal.Signals, done: trio.CancelScope) -> None:
        # Balancers need a moment to notice; a person at a terminal does not want to wait for it.
        grace_s = self._config.drain_grace_s if asked_by is signal.SIGTERM else 0.0
        logger.info("%s: draining, taking requests for %g s more", asked_by.name, grace_s)
        self._drained_by_operator = False
        self._enter(NodeStatus.DRAINING)
        await trio.sleep(grace_s)
        self.scheduler.refuse_new(Draining(self._config.shutdown_timeout_s))
        with trio.move_on_after(self._config.shutdown_timeout_s):
            while self.scheduler.admitted:  # noqa: ASYNC110  (an event for this alone would burden each release)
                await trio.sleep(_IDLE_LOOK_S)
        if self.scheduler.admitted:
            logger.warning("shutdown_timeout_s is over: ending %d requests", self.scheduler.admitted)
        done.cancel()

    async def _stop(self) -> None:
        self._enter(NodeStatus.STOPPING)
        self.scheduler.refuse_new(Draining(self._config.shutdown_timeout_s))
        self._last_resort = _exit_after(self._config.llama_server_stop_grace_s + _LAST_RESORT_S)
        self._front_shuts.set()
        await self._front_ended.wait()
        if self._dispatcher is not None:
            await self._dispatcher.farewell()

    # Reporting.

    def _device_status(self, host: DeviceServers) -> DeviceStatus:
        device_id = host.device.device_id
        return DeviceStatus(
            host.device, self._monitor.latest(device_id), self._lanes[device_id].view(), tuple(host.views())
        )

    def _model_status(self, model: ModelConfig) -> ModelStatus:
        header = self._catalogue.header(model.model_id)
        loads = [lane.times.measured_load_s(model.model_id) for lane in self._lanes.values()]
        measured = [load_s for load_s in loads if load_s is not None]
        return ModelStatus(
            model_id=model.model_id,
            aliases=_aliases(model),
            roles=tuple(model.roles),
            endpoints=ENDPOINTS,
            parallel=model.parallel,
            path=str(model.path),
            arguments=launch.model_arguments(model),
            ctx_size=model.ctx_size or (header.ctx_train if header else None),
            size_bytes=header.size_bytes if header else None,
            problem=self._catalogue.problem(model.model_id),
            load_time_s=min(measured, default=None),
        )


def _aliases(model: ModelConfig) -> tuple[str, ...]:
    return (model.alias,) if model.alias else ()


def _rules(config: NodeConfig) -> LaneRules:
    return LaneRules(
        max_pending=config.max_pending_requests_per_device,
        queue_timeout_s=config.queue_timeout_s,
        startup_timeout_s=config.llama_server_startup_timeout_s,
        abandoned_load_grace_s=config.abandoned_load_grace_s,
        policy=FirstCome() if config.scheduling == "fifo" else _swap_aware(config),
    )


def _swap_aware(config: NodeConfig) -> SwapAware:
    return SwapAware(config.swap_fairness_s, config.min_residency_s, config.residency_linger_s)


def _reachable_here(listen_host: str) -> str:
    """An address at which this host reaches what listens there."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen_host, listen_host)


def _read_again(config: NodeConfig) -> NodeConfig:
    if config.source.file is None:
        raise ConfigError([Problem("this configuration did not come from a file")])
    again = load_config(config.source.file)
    find_llama_server(again)
    return again


def _warn_of_supervisord() -> None:
    with suppress(PackageNotFoundError):
        logger.warning(
            "the package supervisor %s is installed in the same environment: its modules and ours share a folder, and "
            "either may break the other; give the agent an environment of its own",
            version("supervisor"),
        )


def _base_url(host: str, port: int) -> str:
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _receive_signals(*, task_status: trio.TaskStatus[AsyncIterator[int]]) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started(signals)
        await trio.sleep_forever()


def _exit_after(after_s: float) -> threading.Timer:
    """End the process in any case: a thread's timer, so that nothing in the event loop can hold it up."""

    def end() -> None:
        logger.critical("still not stopped after %g s; exiting now", after_s)
        os._exit(70)

    timer = threading.Timer(after_s, end)
    timer.daemon = True
    timer.start()
    return timer
