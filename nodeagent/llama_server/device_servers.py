"""The servers of one device: models turned into supervised children, at most one of them at a time.

The state of each server is the supervisor's own; this module translates it, and keeps beside it only the connections
to the server that is ready.
"""

import logging
from collections.abc import Mapping, Sequence

import trio

from nodeagent.config import ModelConfig
from nodeagent.devices.monitor import DeviceMonitor
from nodeagent.devices.values import DeviceRef
from nodeagent.errors import BackendUnavailable
from nodeagent.llama_server.catalogue import Catalogue, misfit
from nodeagent.llama_server.page_cache import read_ahead
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.saved_caches import SavedCaches
from nodeagent.llama_server.server_id import ServerId
from nodeagent.llama_server.stall_watch import Worker
from nodeagent.scheduling.seam import Obstacle, ServerState, ServerView
from supervisor.lifecycle import Event, Exited, Ready, Stopping
from supervisor.spec import ChildSpec
from supervisor.supervisor import ChildSnapshot, ChildState, GivenUp, StartFailed, Supervisor

logger = logging.getLogger(__name__)

_STATES = {
    ChildState.STARTING: ServerState.STARTING,
    ChildState.READY: ServerState.READY,
    ChildState.UNHEALTHY: ServerState.UNHEALTHY,
    ChildState.STOPPING: ServerState.STOPPING,
    ChildState.BACKING_OFF: ServerState.BACKING_OFF,
    ChildState.FAILED: ServerState.FAILED,
}
# How many of a dead server's last lines are told to the client and in the inventory; the log has them all.
_LAST_WORDS = 5


class DeviceServers:
    """One device's servers; implements `scheduling.seam.Servers[Upstream]`.

    `specs` maps each model id to the child that serves it here; `api_key` is what these children were given.
    What changes: `_models` and `_specs` in `replace`, `_upstreams` in `handle`, `_started` in `ensure`, and
    `_bringing_back` (the model whose kept cache is read into its server, which is not ready before that) there too.
    """

    def __init__(
        self,
        device: DeviceRef,
        models: Mapping[str, ModelConfig],
        specs: Mapping[str, ChildSpec],
        api_key: str,
        *,
        supervisor: Supervisor,
        catalogue: Catalogue,
        monitor: DeviceMonitor,
        caches: SavedCaches,
        patience_s: float,
    ) -> None:
        self.device = device
        self._models = models
        self._specs = specs
        self._api_key = api_key
        self._supervisor = supervisor
        self._catalogue = catalogue
        self._monitor = monitor
        self._caches = caches
        self._patience_s = patience_s
        self._bringing_back: str | None = None
        self._started: dict[str, ChildSpec] = {}
        self._upstreams: dict[str, Upstream] = {}

    def replace(
        self, models: Mapping[str, ModelConfig], specs: Mapping[str, ChildSpec], patience_s: float
    ) -> list[str]:
        """Take another configuration; return the models with a server that it has no place for any more.

        Those servers go on until they are stopped; a start from now on follows the new configuration. A model that has
        failed and that it changes may be started at once.
        """
        self._models, self._specs, self._patience_s = models, specs, patience_s
        for model_id, spec in self._started.items():
            if specs.get(model_id) != spec:
                self.reset_failure(model_id)
        return [model_id for model_id in self._running() if not self._runs_as(model_id, specs.get(model_id))]

    def reset_failure(self, model_id: str) -> bool:
        """Let a model that has failed be started at once, as if it never had; whether it had failed."""
        child = self._child(model_id)
        if child is None or child.state is not ChildState.FAILED:
            return False
        self._supervisor.forget(child.child_id)
        return True

    def _runs_as(self, model_id: str, spec: ChildSpec | None) -> bool:
        """Whether the model's child is the same process under that spec: how it is kept (its restarts, its pauses) may
        differ, and follows with its next start."""
        started = self._started[model_id]
        return spec is not None and _process(started) == _process(spec)

    def views(self) -> list[ServerView[Upstream]]:
        """Every server that runs, is about to, or has failed (a model whose file can't be used has, too)."""
        children = self._supervisor.snapshot()
        model_ids = dict.fromkeys((*self._models, *self._started))
        views = (self._view(model_id, children.get(self._child_id(model_id))) for model_id in model_ids)
        return [view for view in views if view is not None]

    def obstacle(self, model_id: str) -> Obstacle | None:
        """What keeps this device from serving the model: it does not fit, or it failed and is cooling down."""
        if model_id not in self._models:
            return Obstacle("it is not configured any more")
        header = self._catalogue.header(model_id)
        unfit = misfit(header, self._models[model_id], self.device) if header is not None else None
        if unfit is not None:
            return Obstacle(unfit)
        child = self._child(model_id)
        if child is None or child.retry_at is None:
            return None
        soon = child.retry_at - trio.current_time()
        if (child.state is ChildState.FAILED and soon > 0) or soon > self._patience_s:
            return Obstacle(self._reason(child) or "failed", child.retry_at)
        return None

    def has_room(self, model_id: str) -> bool:
        free_bytes = self.memory_free_bytes()
        return free_bytes is None or self._takes_bytes(model_id) <= free_bytes + sum(
            self._takes_bytes(running) for running in self._running()
        )

    def _takes_bytes(self, model_id: str) -> int:
        """What a copy of the model takes of the device's memory, 0 where that is not known. On a CPU the weights are
        mapped from the file: all copies share them, and the system takes back what it needs of them."""
        header, model = self._catalogue.header(model_id), self._models.get(model_id)
        if header is None or model is None:
            return 0
        needed = header.estimate_bytes(ctx_size=model.ctx_size)
        return needed - header.size_bytes if self.device.backend == "cpu" else needed

    def memory_free_bytes(self) -> int | None:
        reading = self._monitor.latest(self.device.device_id)
        return reading.memory_free_bytes if reading is not None else None

    async def ensure(self, model_id: str) -> None:
        """Return when this device runs a ready server of the model and no other. See `scheduling.seam.Servers`."""
        model = await self._usable(model_id)
        spec = self._specs[model_id]
        others = [other for other in self._running() if other != model_id or not self._runs_as(other, spec)]
        for other in others:
            await self.stop(other)
        if others:
            await self._monitor.settled(self.device.device_id)
        if model_id in self._running():
            spec = self._started[model_id]
        self._started[model_id] = spec
        try:
            if model.keep_kv:
                await self._start_with_cache(model, spec)
            else:
                await self._supervisor.start(spec)
        except StartFailed as failure:
            reason = _with_last_words(failure.exit.reason, failure.exit.last_lines)
            child = self._child(model_id)
            raise self._unavailable(model_id, reason, child.retry_at if child else None) from failure
        except GivenUp as failure:
            raise self._unavailable(model_id, failure.reason, failure.retry_at) from failure

    async def _usable(self, model_id: str) -> ModelConfig:
        """The model, if nothing is known to keep this device from serving it and its file can be used."""
        obstacle = self.obstacle(model_id)
        if obstacle is not None:
            raise self._unavailable(model_id, obstacle.reason, obstacle.retry_at)
        model = self._models[model_id]
        problem = await self._catalogue.inspect(model)
        if problem is not None:
            raise BackendUnavailable(model_id, problem)
        return model

    async def prepare(self, model_id: str) -> None:
        """Look at the model's file, and have it in the page cache. See `scheduling.seam.Servers`."""
        model = await self._usable(model_id)
        size = await read_ahead(model.path)
        logger.debug("%s: %d bytes of %s are read ahead", self.device.device_id, size, model_id)

    async def stop(self, model_id: str) -> None:
        """Stop the model's server, and keep its cache if it is to be and nobody uses it."""
        spec, upstream = self._specs.get(model_id), self._upstreams.get(model_id)
        as_configured = spec == self._started.get(model_id)
        if spec is not None and as_configured and upstream is not None and not upstream.in_flight:
            model = self._models[model_id]
            if model.keep_kv:
                await self._caches.keep(spec, model.path, upstream, model.parallel)
        await self._supervisor.stop(self._child_id(model_id))

    async def _start_with_cache(self, model: ModelConfig, spec: ChildSpec) -> None:
        model_id = model.model_id
        try:
            self._caches.make_folder()  # the server will not start without
        except OSError as error:
            raise self._unavailable(model_id, f"{self._caches.folder}: {error.strerror}", None) from error
        self._bringing_back = model_id if self._caches.has(spec.child_id) else None
        try:
            await self._supervisor.start(spec)
            if model_id in self._upstreams:
                await self._caches.bring_back(spec, model.path, self._upstreams[model_id])
        finally:
            self._bringing_back = None
            self._caches.forget(spec.child_id)

    def runs(self, model_id: str) -> bool:
        """Whether the model has a process here, or is about to."""
        return model_id in self._running()

    def workers(self, stall_timeout_s: float) -> list[Worker]:
        """The ready servers, as the watch over stalls looks at them."""
        found = []
        for model_id, upstream in self._upstreams.items():
            child, model = self._child(model_id), self._models.get(model_id)
            if child is None or child.pid is None or child.state is not ChildState.READY:
                continue
            own_timeout_s = model.stall_timeout_s if model is not None else None
            found.append(
                Worker(
                    child.child_id,
                    child.generation,
                    child.pid,
                    upstream,
                    own_timeout_s or stall_timeout_s,
                    counts_cpu=self.device.backend == "cpu",
                )
            )
        return found

    def handle(self, event: Event) -> None:
        """Keep the connections in step with what the supervisor says of a child of this device."""
        model_id = ServerId.parse(event.child_id).model_id
        match event:
            case Ready(address=address):
                self._upstreams[model_id] = Upstream(address, self._api_key)
            case Stopping() if model_id in self._upstreams:
                self._upstreams[model_id].ends_as_asked = True
            case Exited():
                upstream = self._upstreams.pop(model_id, None)
                if upstream is not None:
                    upstream.close()

    def _child_id(self, model_id: str) -> str:
        return str(ServerId(self.device.device_id, model_id))

    def _child(self, model_id: str) -> ChildSnapshot | None:
        return self._supervisor.snapshot().get(self._child_id(model_id))

    def _running(self) -> list[str]:
        """The models whose child has a process, or is about to."""
        at_rest = (ChildState.STOPPED, ChildState.FAILED)
        children = {model_id: self._child(model_id) for model_id in self._started}
        return [model_id for model_id, child in children.items() if child is not None and child.state not in at_rest]

    def _view(self, model_id: str, child: ChildSnapshot | None) -> ServerView[Upstream] | None:
        model = self._models.get(model_id)
        slots = model.parallel if model is not None else 1
        if child is None or child.state is ChildState.STOPPED:
            problem = self._catalogue.problem(model_id) if model is not None else None
            if problem is None:
                return None
            return ServerView(
                model_id=model_id,
                state=ServerState.FAILED,
                generation=0,
                since=trio.current_time(),
                slots=slots,
                reason=problem,
            )
        if model is None and child.state is ChildState.FAILED:
            return None
        state = _STATES[child.state]
        if state is ServerState.READY and model_id == self._bringing_back:
            state = ServerState.STARTING
        return ServerView(
            model_id=model_id,
            state=state,
            generation=child.generation,
            since=child.since,
            slots=slots,
            spawned_at=child.spawned_at,
            reason=self._reason(child),
            retry_at=child.retry_at,
            endpoint=self._upstreams.get(model_id) if state is ServerState.READY else None,
            idle_unload_s=model.idle_unload_s if model is not None else None,
        )

    def _reason(self, child: ChildSnapshot) -> str | None:
        """Why the child is in its state; of one that ended, with its last words."""
        if child.reason is None or child.state not in (ChildState.BACKING_OFF, ChildState.FAILED):
            return child.reason
        return _with_last_words(child.reason, self._supervisor.lines(child.child_id, _LAST_WORDS))

    def _unavailable(self, model_id: str, reason: str, retry_at: float | None) -> BackendUnavailable:
        retry_after_s = None if retry_at is None else max(0.0, retry_at - trio.current_time())
        return BackendUnavailable(model_id, f"{self.device.device_id}: {reason}", retry_after_s)


def _process(spec: ChildSpec) -> tuple[object, ...]:
    """What of a spec makes another process."""
    return spec.argv, spec.env, spec.cpus, spec.cwd, spec.probe


def _with_last_words(reason: str, lines: Sequence[str]) -> str:
    last_words = " | ".join(lines[-_LAST_WORDS:])
    return f"{reason}; it last printed: {last_words}" if last_words else reason
