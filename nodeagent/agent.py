"""Builds the node from its configuration and runs its tasks from start to stop.

lock the state folder, bind the address, find the devices
├── self-watch      tells the service manager how the agent is, until the end
├── loop lag        how late the event loop is, and why
├── supervisor      owns the children
├── node            background work that requests start
├── monitor         reads the devices
├── load meter      measures what loads took
├── activity file   writes what requests took, where a file is configured
├── API keys        reads them again when they change, keeps their sums
├── lanes           one task per device, and one per group of devices that models span
├── stall watch     reports busy servers that make no progress to the supervisor
├── front           hypercorn and the Quart-Trio app; HAProxy's agent check
└── dispatcher      registration and heartbeats

Stopping goes from the outside in: drain, the front, the dispatcher's last heartbeat, the children. Signals are caught
around all of it, from the start to the end (`signals`).
"""

import gc
import logging
import os
import secrets
import ssl
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import trio

from nodeagent import descriptors, host_names, reload, state_dir
from nodeagent.access.gate import Gate
from nodeagent.config import (
    ApiKeyConfig,
    NodeConfig,
    find_llama_server,
    guarding_keys,
    read_token,
    require_extras,
    tls_context,
)
from nodeagent.devices.backend import Backend, Build
from nodeagent.devices.limits import own_cpus
from nodeagent.devices.monitor import DeviceMonitor
from nodeagent.devices.selection import devices_of, select
from nodeagent.devices.values import DeviceRef
from nodeagent.errors import ConfigError
from nodeagent.front import agent_check
from nodeagent.front.activity import Activity
from nodeagent.front.asgi import Front
from nodeagent.front.bodies import Limits
from nodeagent.front.exchange import ASGIApp
from nodeagent.front.fast_road import FastRoad
from nodeagent.front.inference import Inference
from nodeagent.front.ordinary_road import LazyApp
from nodeagent.front.server import OpenConnections, bind, serve
from nodeagent.llama_server import stall_watch
from nodeagent.llama_server.binary_help import Dialects
from nodeagent.llama_server.catalogue import Catalogue
from nodeagent.llama_server.command_line import child_spec
from nodeagent.llama_server.device_servers import DeviceServers
from nodeagent.llama_server.fit import with_reserve
from nodeagent.llama_server.last_words import last_error
from nodeagent.llama_server.load_meter import LoadMeter
from nodeagent.llama_server.measured_loads import MeasuredLoads
from nodeagent.llama_server.probe import LlamaServerProbe
from nodeagent.llama_server.saved_caches import SavedCaches
from nodeagent.llama_server.spans import misplaced, spans_of
from nodeagent.loop_lag import LoopLag
from nodeagent.managed_device import BuildSpecs, Part, lane_rules, manage
from nodeagent.node import Node, NodeIdentity
from nodeagent.self_watch import SelfWatch
from nodeagent.service_manager import ServiceManager
from nodeagent.shutdown import drain
from nodeagent.signals import Signals
from nodeagent.status import Phase, in_a_line
from supervisor.lifecycle import Event
from supervisor.records import Records, sweep
from supervisor.spec import ChildSpec
from supervisor.supervisor import Supervisor

if TYPE_CHECKING:
    from nodeagent.dispatcher.client import DispatcherClient
    from nodeagent.front.tracing import Tracing

logger = logging.getLogger(__name__)

# The process ends this long after its children had time to stop, even if a client that reads nothing or a driver that
# hangs holds it up. Everything else on the way out takes less.
_LAST_RESORT_S = 15.0
# After the drain, responses in progress are cut off; this is for the last bytes of those that have just ended.
_LAST_BYTES_S = 1.0
_LAST_SPANS_S = 2.0


async def run(config: NodeConfig, *, on_ready: Callable[[str], None] = lambda _base_url: None) -> None:
    """Run the node until a signal has stopped it; `on_ready` gets the base URL once requests are accepted.

    Raises ConfigError or StartupError, before any child is started, if the node can't run here, and EndedAtOnce after a
    second signal. Cancelling stops the children and returns.
    """
    signals = Signals(last_resort_s=config.llama_server_stop_grace_s + _LAST_RESORT_S)
    with closing(ServiceManager()) as manager, signals.caught(), signals.scope:
        await _run(config, signals, manager, on_ready)


async def _run(config: NodeConfig, signals: Signals, manager: ServiceManager, on_ready: Callable[[str], None]) -> None:
    reload.log_warnings(config)
    descriptors.raise_limit()
    binary = find_llama_server(config)
    require_extras(config)
    _warn_of_supervisord()
    with state_dir.locked(config.state_dir):
        keys, tls = guarding_keys(config), tls_context(config)
        sweep(state_dir.children_file(config.state_dir))
        listeners, port = await bind(config.listen_host, config.listen_port)
        checked = await _bind_agent_check(config)
        backend = await trio.to_thread.run_sync(select, config.backend, config.devices, Build(binary))
        try:
            # In threads, here and above: drivers can be slow.
            cpus = own_cpus()
            devices = await trio.to_thread.run_sync(devices_of, backend, config.devices, cpus)
            if cpus.usable < cpus.host:
                logger.info("servers may use %s", cpus)
            devices = with_reserve(devices, config)
            if problems := misplaced(config, devices):
                raise ConfigError(problems)
            agent = Agent(config, backend, devices, binary, port, keys, tls, manager)
            state_dir.write_address(config.state_dir, agent.node.identity.local_url)
            state_dir.write_certificate(config.state_dir, config.tls_cert)
            await agent.run(Listeners(listeners, checked), signals, on_ready)
        finally:
            backend.close()


async def _bind_agent_check(config: NodeConfig) -> list[trio.SocketListener]:
    """The listeners for HAProxy's agent check, none if it is not configured. Raises StartupError."""
    if config.agent_check_port is None:
        return []
    listeners, port = await bind(config.listen_host, config.agent_check_port, port_key="agent_check_port")
    logger.info("HAProxy's agent check is answered at port %d", port)
    return listeners


class Listeners(msgspec.Struct, frozen=True):
    """Where the node listens."""

    http: list[trio.SocketListener]
    agent_check: list[trio.SocketListener]


class Agent:
    """The parts of the node, and the nursery in which they run."""

    def __init__(
        self,
        config: NodeConfig,
        backend: Backend,
        devices: list[DeviceRef],
        binary: Path,
        port: int,
        keys: Mapping[str, ApiKeyConfig],
        tls: ssl.SSLContext | None,
        manager: ServiceManager,
    ) -> None:
        self._config = config
        self._manager = manager
        records = Records(state_dir.children_file(config.state_dir))
        self._supervisor = Supervisor(
            on_event=self._on_event,
            on_line=self._on_line,
            records=records,
            may_restart=self._may_restart,
            last_words=last_error,
        )
        spans = spans_of(config, devices)
        self._monitor = DeviceMonitor(backend, devices, settle_max_s=config.memory_settle_timeout_s)
        self._dialects = Dialects()
        self._catalogue = Catalogue(look_at_programs=self._dialects.look)
        self._caches = SavedCaches(state_dir.kv_folder(config.state_dir))
        self._meter = LoadMeter(
            self._caches,
            MeasuredLoads(state_dir.loads_file(config.state_dir)),
            [*devices, *spans],
            catalogue=self._catalogue,
            monitor=self._monitor,
            child_of=self._supervisor.child,
        )
        managed = manage(
            [self._part(device, backend, binary, spans) for device in devices],
            [self._part(span, backend, binary) for span in spans],
            config,
        )
        identity = _identity(config, port)
        self._gate = Gate(state_dir.admin_token(config.state_dir), config.state_dir, keys)
        self.node = Node(
            config, identity, managed, catalogue=self._catalogue, monitor=self._monitor, gate=self._gate, tls=tls
        )
        self._dispatcher = _dispatcher_client(config, self.node)
        self.node.dispatcher = self._dispatcher
        self._activity = Activity(config.activity.max_records)
        self._limit_bodies(config)
        self.node.on_reload = self._limit_bodies
        self._tracing = _tracing(config, identity)
        self.node.while_reloading = manager.reloading
        lanes = [device.lane for device in managed.values()]
        self._self_watch = SelfWatch(manager, lanes, lambda: in_a_line(self.node.snapshot()))
        self._stop_front = trio.Event()
        self._front_ended = trio.Event()

    async def run(self, listeners: "Listeners", signals: Signals, on_ready: Callable[[str], None]) -> None:
        """Run until a signal asks for the end, then drain, stop the children, and return."""
        try:
            async with trio.open_nursery() as watching:
                try:
                    await self._run_parts(listeners, signals, on_ready, watching)
                finally:
                    signals.on_kill = lambda: None  # before `watching` is closed, in which it would start a task
                watching.cancel_scope.cancel()
        finally:
            self._caches.clear()
            await self._send_last_spans()
            logger.info("node %s has stopped", self.node.node_id)

    async def _run_parts(
        self,
        listeners: "Listeners",
        signals: Signals,
        on_ready: Callable[[str], None],
        watching: trio.Nursery,
    ) -> None:
        """What is started in `watching` goes on until the children have stopped."""
        node = self.node
        await self._catalogue.inspect_all(self._config.models)
        for device in node.devices.values():
            device.recall_loads()
        async with trio.open_nursery() as nursery:
            signals.on_kill = partial(watching.start_soon, self._supervisor.kill_all, name="kill all servers")
            await nursery.start(self._supervisor.run, name="supervisor")
            await nursery.start(node.run, name="node")
            signals.on_reload = node.reload_soon
            await nursery.start(self._monitor.run, name="monitor")
            await nursery.start(self._meter.run, name="load meter")
            if self._config.activity.path is not None:
                await self._keep_activity(nursery, self._config.activity.path)
            await nursery.start(self._gate.run, node.read_api_keys, name="API keys")
            for device_id, device in node.devices.items():
                await nursery.start(device.lane.run, name=f"lane {device_id}")
            nursery.start_soon(self._learn_host_name, name="look up the host's name")
            nursery.start_soon(stall_watch.watch, self._watched_servers, self._supervisor.fail, name="stall watch")
            node.preload()
            await nursery.start(self._serve_front, listeners.http, name="front")
            if listeners.agent_check:
                await nursery.start(agent_check.serve, node, listeners.agent_check, name="agent check")
            node.enter(Phase.SERVING)
            if self._dispatcher is not None:
                await nursery.start(self._dispatcher.run, name="dispatcher")
            logger.info("node %s accepts requests at %s", node.node_id, node.identity.base_url)
            _spare_the_collector()
            watching.start_soon(self._self_watch.run, name="self-watch")
            watching.start_soon(LoopLag(node.loop_lag_s).run, name="loop lag")
            self._manager.ready()
            on_ready(node.identity.base_url)
            signum = await signals.until_asked()
            self._self_watch.stop()
            await drain(node, signum)
            signals.on_reload = lambda: None
            signals.end_in_time()
            await self._stop()
            nursery.cancel_scope.cancel()  # the supervisor stops the children before its task ends

    def _limit_bodies(self, config: NodeConfig) -> None:
        keys = config.activity
        self._activity.bodies.limit(Limits(keys.max_body_bytes, keys.max_bodies_bytes) if keys.bodies else None)

    async def _keep_activity(self, nursery: trio.Nursery, path: Path) -> None:
        from nodeagent.front.activity_file import ActivityFile  # with SQLite, which other nodes don't need

        file = ActivityFile(path, self._activity)
        await trio.to_thread.run_sync(file.open)
        await nursery.start(file.run, name="activity file")

    async def _send_last_spans(self) -> None:
        if self._tracing is not None:
            with trio.move_on_after(_LAST_SPANS_S) as scope:
                scope.shield = True
                await trio.to_thread.run_sync(self._tracing.close, abandon_on_cancel=True)

    async def _learn_host_name(self) -> None:
        self.node.full_host_name = await host_names.full_name()

    async def _stop(self) -> None:
        self.node.enter(Phase.STOPPING)
        self.node.refuse_requests()
        self._stop_front.set()
        await self._front_ended.wait()
        if self._dispatcher is not None:
            await self._dispatcher.stop()

    async def _serve_front(self, listeners: list[trio.SocketListener], *, task_status: trio.TaskStatus[None]) -> None:
        node = self.node
        inference = Inference(node.scheduler, self._activity)
        node.gate.settle = inference.tallies.settle
        if self._tracing is not None:
            inference.tallies.on_end = self._tracing.ended
        app = LazyApp(partial(_web_application, node, inference))
        front = Front(app, max_request_bytes=node.max_request_bytes, node_id=node.node_id)
        connections = OpenConnections()
        node.count_connections = connections.counts
        try:
            await serve(
                front,
                listeners,
                shutdown=self._stop_front,
                find_handler=FastRoad(node, front, inference).find_handler,
                graceful_timeout_s=_LAST_BYTES_S,
                find_tls=lambda: node.tls,
                connections=connections,
                task_status=task_status,
            )
        finally:
            self._front_ended.set()

    def _watched_servers(self) -> list[stall_watch.Worker]:
        timeout_s = self.node.config.stall_timeout_s
        return [worker for device in self.node.devices.values() for worker in device.servers.workers(timeout_s)]

    def _on_event(self, event: Event) -> None:
        self.node.on_child_event(event)

    def _on_line(self, child_id: str, generation: int, line: str) -> None:
        self.node.on_child_line(child_id, generation, line)

    def _may_restart(self, child_id: str) -> bool:
        return self.node.may_restart(child_id)

    def _part(self, ref: DeviceRef, backend: Backend, binary: Path, spans: Sequence[DeviceRef] = ()) -> Part:
        config = self._config
        # One key per device and start of the agent: nobody else on the host can use the children.
        api_key = secrets.token_urlsafe(32)
        build_specs: BuildSpecs = partial(_ChildSpecs, ref, backend, binary, api_key, self._catalogue, self._dialects)
        servers = DeviceServers(
            ref,
            {model.model_id: model for model in config.models},
            build_specs(config),
            api_key,
            supervisor=self._supervisor,
            catalogue=self._catalogue,
            monitor=self._monitor,
            hooks=self._meter,
            measurements=self._meter,
            patience_s=config.llama_server_startup_timeout_s,
            max_models=lane_rules(config, ref).max_models,
            spans=spans,
        )
        return Part(ref, servers, build_specs)


def _spare_the_collector() -> None:
    """Let the garbage collector pass over the modules, classes and configuration that the start has made.

    They stay until the end, and a full collection that walks through them holds up every request for tens of
    milliseconds. While it starts, the collector is off.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


class _ChildSpecs(Mapping[str, ChildSpec]):
    """The specs of one device's children by model id. Each is made when it is asked for: it depends on the model's
    file, which is read again with each load."""

    def __init__(
        self,
        device: DeviceRef,
        backend: Backend,
        binary: Path,
        api_key: str,
        catalogue: Catalogue,
        dialects: Dialects,
        config: NodeConfig,
    ) -> None:
        self._device = device
        self._backend = backend
        self._binary = binary
        self._api_key = api_key
        self._catalogue = catalogue
        self._dialects = dialects
        self._config = config
        self._models = {model.model_id: model for model in config.models}
        self._environ = dict(os.environ)
        for model_id in self._models:
            self[model_id]  # so that the binaries that matter are known before the first load

    def __len__(self) -> int:
        return len(self._models)

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def __getitem__(self, model_id: str) -> ChildSpec:
        return child_spec(
            self._models[model_id],
            self._device,
            self._backend,
            self._binary,
            config=self._config,
            probe=LlamaServerProbe(model_id, self._api_key),
            api_key=self._api_key,
            environ=self._environ,
            dialect_of=self._dialects.of,
            header=self._catalogue.header(model_id),
        )


def _identity(config: NodeConfig, port: int) -> NodeIdentity:
    scheme = "https" if config.tls_cert else "http"
    base_url = config.advertise_url or _base_url(scheme, config.listen_host, port)
    local_url = _base_url(scheme, _reachable_here(config.listen_host), port)
    return NodeIdentity(
        base_url=base_url,
        local_url=local_url,
        incarnation=uuid.uuid4().hex,
        started_at=datetime.now(UTC),
        version=version("rolemesh-node-agent"),
        host_names=host_names.known(base_url, local_url),
    )


def _web_application(node: Node, inference: Inference) -> ASGIApp:
    """The application of ordinary requests. Quart is imported here, with the first of them (see `ordinary_road.py`)."""
    from nodeagent.front.app import create_app

    app = create_app(node, inference)
    _spare_the_collector()
    return app


def _tracing(config: NodeConfig, identity: NodeIdentity) -> "Tracing | None":
    if config.otlp_endpoint is None:
        return None
    from nodeagent.front.tracing import Tracing  # with the extra `otel`, which other nodes don't need

    return Tracing(config.otlp_endpoint, node_id=config.node_id, version=identity.version)


def _dispatcher_client(config: NodeConfig, node: Node) -> "DispatcherClient | None":
    if config.dispatcher_base_url is None:
        return None
    # Here, since only nodes with a dispatcher need httpx: 0.1 s and 7 MiB.
    from nodeagent.dispatcher.client import DispatcherClient, loopback_warning

    warning = loopback_warning(node.identity.base_url, config.dispatcher_base_url)
    if warning is not None:
        logger.warning("%s", warning)
    return DispatcherClient(
        config.dispatcher_base_url,
        token=read_token(config),
        node=node,
        heartbeat_interval_s=config.heartbeat_interval_s,
    )


def _reachable_here(listen_host: str) -> str:
    """The address by which this host reaches a listener on `listen_host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(listen_host, listen_host)


def _base_url(scheme: str, host: str, port: int) -> str:
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _warn_of_supervisord() -> None:
    with suppress(PackageNotFoundError):
        logger.warning(
            "the package supervisor %s is in the same environment: its modules and the agent's share a folder "
            "and can break each other; install the agent into an environment of its own",
            version("supervisor"),
        )
