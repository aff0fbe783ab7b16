"""The servers of one device: models turned into supervised children, at most one of them at a time.

The state of each server is the supervisor's. This module translates it for scheduling, and keeps beside it only the
connections to the server that is ready.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial

import trio

from nodeagent.config import ModelConfig
from nodeagent.devices.values import DeviceRef
from nodeagent.errors import BackendUnavailable
from nodeagent.llama_server.catalogue import bytes_on_device, misfit
from nodeagent.llama_server.last_words import LINES_READ, last_words
from nodeagent.llama_server.page_cache import read_ahead
from nodeagent.llama_server.reason_codes import ReasonCode
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.seams import DeviceReadings, ModelFiles, ServerHooks
from nodeagent.llama_server.server_id import ServerId
from nodeagent.llama_server.server_views import (
    code_of,
    last_lines_of,
    view_of_child,
    view_of_unusable_model,
)
from nodeagent.llama_server.stall_watch import Worker
from nodeagent.scheduling.seam import Obstacle, ServerView
from supervisor.errors import GivenUp, StartFailed
from supervisor.lifecycle import Cause, Event, Exited, Ready, Stopping
from supervisor.snapshot import ChildSnapshot, ChildState
from supervisor.spec import ChildSpec
from supervisor.supervisor import Supervisor

logger = logging.getLogger(__name__)

# These ends follow from the state of the host or of the agent, whatever the server was doing.
_NO_REQUEST_IS_TO_BLAME = frozenset({Cause.OUT_OF_MEMORY, Cause.OWN_SHORTAGE, Cause.SUSPENDED, Cause.INTERNAL_ERROR})


class DeviceServers:
    """One device's servers; implements `scheduling.seam.Servers[Upstream]`.

    `specs` maps each model id to the child that serves it here; `api_key` is what these children were given. A child
    that will be restarted only after `patience_s` is an obstacle.

    What changes: `_models`, `_specs` and `_patience_s` in `replace`; `_started` (the spec with which each model was
    last started) and `_still_starting` (the model whose server is not ready before `after_ready` is done) in `ensure`;
    `_upstreams` in `handle`.
    """

    def __init__(
        self,
        device: DeviceRef,
        models: Mapping[str, ModelConfig],
        specs: Mapping[str, ChildSpec],
        api_key: str,
        *,
        supervisor: Supervisor,
        catalogue: ModelFiles,
        monitor: DeviceReadings,
        hooks: ServerHooks,
        patience_s: float,
    ) -> None:
        self.device = device
        self._models = models
        self._specs = specs
        self._api_key = api_key
        self._supervisor = supervisor
        self._catalogue = catalogue
        self._monitor = monitor
        self._hooks = hooks
        self._patience_s = patience_s
        self._still_starting: str | None = None
        self._started: dict[str, ChildSpec] = {}
        self._upstreams: dict[str, Upstream] = {}

    def __repr__(self) -> str:
        return f"<DeviceServers {self.device.device_id}: running {self._running()}>"

    # What a reload of the configuration and operators do.

    def replace(
        self, models: Mapping[str, ModelConfig], specs: Mapping[str, ChildSpec], patience_s: float
    ) -> list[str]:
        """Take over another configuration; return the models whose running server does not match it.

        Those servers run on until they are stopped; a start from now on follows the new configuration. A model that
        has failed and whose configuration changes may be started at once.
        """
        self._models, self._specs, self._patience_s = models, specs, patience_s
        for model_id, spec in self._started.items():
            if specs.get(model_id) != spec:
                self.reset_failure(model_id)
        return [model_id for model_id in self._running() if not self._runs_as(model_id, specs.get(model_id))]

    def reset_failure(self, model_id: str) -> bool:
        """Let a model that has failed be started at once, as if it never had; return whether it had failed."""
        child = self._child(model_id)
        if child is None or child.state is not ChildState.FAILED:
            return False
        self._supervisor.forget(child.child_id)
        return True

    # What scheduling asks (scheduling.seam.Servers).

    def views(self) -> list[ServerView[Upstream]]:
        """Every server that runs, is about to, or has failed; a model whose file can't be used has failed too."""
        children = self._supervisor.snapshot()
        model_ids = dict.fromkeys((*self._models, *self._started))
        views = (self._view(model_id, children.get(self._child_id(model_id))) for model_id in model_ids)
        return [view for view in views if view is not None]

    def obstacle(self, model_id: str) -> Obstacle | None:
        """What keeps this device from serving the model: it is no longer configured, does not fit, or has failed."""
        if model_id not in self._models:
            return Obstacle("it is no longer configured", reason_code=ReasonCode.NOT_CONFIGURED)
        header = self._catalogue.header(model_id)
        unfit = misfit(header, self._models[model_id], self.device) if header is not None else None
        if unfit is not None:
            return Obstacle(unfit, reason_code=ReasonCode.DOES_NOT_FIT)
        child = self._child(model_id)
        if child is None or child.retry_at is None:
            return None
        wait_s = child.retry_at - trio.current_time()
        if (child.state is ChildState.FAILED and wait_s > 0) or wait_s > self._patience_s:
            return Obstacle(child.reason or "failed", child.retry_at, code_of(child))
        return None

    def has_room(self, model_id: str) -> bool:
        free_bytes = self.memory_free_bytes()
        return free_bytes is None or self._bytes_of(model_id) <= free_bytes + sum(map(self._bytes_of, self._running()))

    def memory_free_bytes(self) -> int | None:
        reading = self._monitor.latest(self.device.device_id)
        return reading.memory_free_bytes if reading is not None else None

    async def ensure(self, model_id: str) -> None:
        """Return when this device runs a ready server of the model and no other. See `scheduling.seam.Servers`."""
        model = await self._usable(model_id)
        spec = self._specs[model_id]
        to_stop = [other for other in self._running() if other != model_id or not self._runs_as(other, spec)]
        for other in to_stop:
            await self.stop(other)
        if to_stop:
            await self._monitor.settled(self.device.device_id)
        if model_id in self._running():
            spec = self._started[model_id]
        self._started[model_id] = spec
        try:
            await self._start(model, spec)
        except StartFailed as failure:
            child = self._child(model_id)
            retry_at = child.retry_at if child else None
            is_same = child is not None and child.generation == failure.generation
            lines = self._lines(failure.child_id) if is_same else failure.exit.last_lines
            said = last_words(lines, spec.argv)
            raise self._unavailable(model_id, failure.exit.reason, retry_at, said) from failure
        except GivenUp as failure:
            raise self._unavailable(model_id, failure.reason, failure.retry_at) from failure

    async def prepare(self, model_id: str) -> None:
        """Check the model's file, and read it into the page cache. See `scheduling.seam.Servers`."""
        model = await self._usable(model_id)
        size = await read_ahead(model.path)
        logger.debug("%s: reading ahead %d bytes of %s", self.device.device_id, size, model_id)

    async def stop(self, model_id: str) -> None:
        """Return once no server of that model runs. See `scheduling.seam.Servers`."""
        model, upstream = self._models.get(model_id), self._upstreams.get(model_id)
        if model is not None and upstream is not None and self._specs[model_id] == self._started.get(model_id):
            await self._hooks.before_stop(model, self._specs[model_id], upstream)
        await self._supervisor.stop(self._child_id(model_id))

    # What the rest of the node asks.

    def runs(self, model_id: str) -> bool:
        """Whether the model has a process here, or is about to get one."""
        return model_id in self._running()

    def workers(self, stall_timeout_s: float) -> list[Worker]:
        """The ready servers, for the stall watch; a model's own `stall_timeout_s` takes precedence."""
        children = {model_id: self._child(model_id) for model_id in self._upstreams}
        return [
            self._worker(model_id, child, child.pid, stall_timeout_s)
            for model_id, child in children.items()
            if child is not None and child.pid is not None and child.state is ChildState.READY
        ]

    def handle(self, event: Event) -> None:
        """Open and close the connections to a child of this device as the supervisor reports its transitions."""
        model_id = ServerId.parse(event.child_id).model_id
        match event:
            case Ready(address=address):
                self._upstreams[model_id] = Upstream(address, self._api_key)
            case Stopping() if model_id in self._upstreams:
                self._upstreams[model_id].ends_as_asked = True
            case Exited(exit=end) if model_id in self._upstreams:
                upstream = self._upstreams.pop(model_id)
                upstream.blameless_end = end.reason if end.cause in _NO_REQUEST_IS_TO_BLAME else None
                upstream.close()

    # Inside.

    async def _usable(self, model_id: str) -> ModelConfig:
        """The model, if this device is not known to be unable to serve it and its file can be used."""
        obstacle = self.obstacle(model_id)
        if obstacle is not None:
            raise self._unavailable(model_id, obstacle.reason, obstacle.retry_at)
        model = self._models[model_id]
        problem = await self._catalogue.inspect(model)
        if problem is not None:
            raise BackendUnavailable(model_id, problem)
        return model

    async def _start(self, model: ModelConfig, spec: ChildSpec) -> None:
        model_id = model.model_id
        try:
            self._still_starting = model_id if self._hooks.before_start(model, spec) else None
        except OSError as error:
            raise self._unavailable(model_id, f"{error.filename}: {error.strerror}", None) from error
        try:
            await self._supervisor.start(spec)
            if model_id in self._upstreams:
                await self._hooks.after_ready(model, spec, self._upstreams[model_id])
        finally:
            self._still_starting = None
            self._hooks.after_start(spec)

    def _child_id(self, model_id: str) -> str:
        return str(ServerId(self.device.device_id, model_id))

    def _child(self, model_id: str) -> ChildSnapshot | None:
        return self._supervisor.snapshot().get(self._child_id(model_id))

    def _running(self) -> list[str]:
        """The models whose child has a process, or is about to get one."""
        children = {model_id: self._child(model_id) for model_id in self._started}
        return [model_id for model_id, child in children.items() if child is not None and child.is_active]

    def _runs_as(self, model_id: str, spec: ChildSpec | None) -> bool:
        """Whether that spec would give the same process as the running one. How a child is supervised (its restarts,
        its time-outs) may differ: that changes with its next start."""
        return spec is not None and _process(self._started[model_id]) == _process(spec)

    def _bytes_of(self, model_id: str) -> int:
        """What a copy of the model takes of the device's memory, 0 if unknown."""
        header, model = self._catalogue.header(model_id), self._models.get(model_id)
        return 0 if header is None or model is None else bytes_on_device(header, model, self.device)

    def _view(self, model_id: str, child: ChildSnapshot | None) -> ServerView[Upstream] | None:
        model = self._models.get(model_id)
        if child is None or child.state is ChildState.STOPPED:
            problem = self._catalogue.problem(model_id)
            if model is None or problem is None:
                return None
            return view_of_unusable_model(model, problem, trio.current_time())
        if model is None and child.state is ChildState.FAILED:
            return None
        return view_of_child(
            model_id,
            model,
            child,
            self._upstreams.get(model_id),
            last_lines=last_lines_of(child, partial(self._lines, child.child_id), self._argv(model_id)),
            still_starting=model_id == self._still_starting,
        )

    def _worker(self, model_id: str, child: ChildSnapshot, pid: int, stall_timeout_s: float) -> Worker:
        model = self._models.get(model_id)
        own_timeout_s = model.stall_timeout_s if model is not None else None
        return Worker(
            child_id=child.child_id,
            generation=child.generation,
            pid=pid,
            upstream=self._upstreams[model_id],
            stall_timeout_s=own_timeout_s or stall_timeout_s,
            counts_cpu=self.device.backend == "cpu",
        )

    def _argv(self, model_id: str) -> Sequence[str]:
        spec = self._started.get(model_id)
        return spec.argv if spec is not None else ()

    def _lines(self, child_id: str) -> Sequence[str]:
        """The last lines that the child's latest process printed."""
        return self._supervisor.lines(child_id, LINES_READ)

    def _unavailable(
        self, model_id: str, reason: str, retry_at: float | None, last_lines: Sequence[str] = ()
    ) -> BackendUnavailable:
        retry_after_s = None if retry_at is None else max(0.0, retry_at - trio.current_time())
        return BackendUnavailable(model_id, f"{self.device.device_id}: {reason}", retry_after_s, last_lines)


def _process(spec: ChildSpec) -> tuple[object, ...]:
    """What of a spec determines the process."""
    return spec.argv, spec.env, spec.cpus, spec.cwd, spec.probe
