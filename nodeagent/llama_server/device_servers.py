"""The servers of one device: models turned into supervised children.

Scheduling says which of them run at the same time.

The state of each server is the supervisor's. This module translates it for scheduling, and keeps beside it only the
connections to the server that is ready.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import is_not

import trio

from nodeagent.config import ModelConfig
from nodeagent.devices.values import DeviceRef
from nodeagent.errors import BackendUnavailable, OutOfDeviceMemory
from nodeagent.llama_server.device_memory import DeviceMemory
from nodeagent.llama_server.fit import Fit
from nodeagent.llama_server.last_words import LINES_READ, last_words
from nodeagent.llama_server.page_cache import read_ahead
from nodeagent.llama_server.reason_codes import ReasonCode
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.seams import DeviceReadings, Measurements, ModelFiles, ServerHooks
from nodeagent.llama_server.server_id import ServerId
from nodeagent.llama_server.server_views import (
    code_of,
    last_lines_of,
    view_of_child,
    view_of_unusable_model,
)
from nodeagent.llama_server.spans import runs_on
from nodeagent.llama_server.stall_watch import Worker
from nodeagent.scheduling.seam import MakeRoom, Obstacle, ServerView
from supervisor.errors import GivenUp, StartFailed
from supervisor.lifecycle import Cause, Event, Exited, Ready, Stopping
from supervisor.snapshot import ChildSnapshot, ChildState
from supervisor.spec import ChildSpec
from supervisor.supervisor import Supervisor

logger = logging.getLogger(__name__)

# What a view of a ready server is made of.
_MadeOf = tuple[ModelConfig | None, ChildSnapshot, Upstream | None, bool, int | None]
# So long after a server ran out of memory the free memory says how much there was for it.
_NOTED_WITHIN_S = 10.0
# These ends follow from the state of the host or of the agent, whatever the server was doing.
_NO_REQUEST_IS_TO_BLAME = frozenset(
    {
        Cause.OUT_OF_MEMORY,
        Cause.OUT_OF_DEVICE_MEMORY,
        Cause.OWN_SHORTAGE,
        Cause.SUSPENDED,
        Cause.INTERNAL_ERROR,
    }
)


class DeviceServers:
    """One device's servers; implements `scheduling.seam.Servers[Upstream]`.

    The device may be several that models span, joined. `spans` are the groups that this device belongs to.
    `specs` maps each model id to the child that serves it here; `api_key` is what these children were given. A child
    that will be restarted only after `patience_s` is an obstacle, and so are pinned models that leave no room among the
    `max_models` which may run at the same time.

    What changes: `_models`, `_specs`, `_patience_s` and `_max_models` in `replace`; `_outdated` (the models whose
    server was started before a reload that changed it) in `replace` and `ensure`; `_started` (the spec with which each
    model was last started) and `_still_starting` (the model whose server is not ready before `after_ready` is done) in
    `ensure`, and `_noted` (the generation of each model's child whose running out of memory has been noted);
    `_upstreams` in `handle`; `_ready_views`, which keeps what every request asks, in `_view_of_ready`.
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
        max_models: int = 1,
        measurements: Measurements | None = None,
        spans: Sequence[DeviceRef] = (),
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
        self._max_models = max_models
        self._measurements = measurements
        self._sharing: Sequence[Sequence[DeviceServers]] = ((self,),)
        self._still_starting: str | None = None
        self._started: dict[str, ChildSpec] = {}
        self._outdated: set[str] = set()
        self._noted: dict[str, int] = {}
        self._upstreams: dict[str, Upstream] = {}
        self._ready_views: dict[str, tuple[_MadeOf, ServerView[Upstream]]] = {}
        self._memory = DeviceMemory(
            device, self._running_on, spans=spans, catalogue=catalogue, monitor=monitor, measurements=measurements
        )
        self._memory.configure(models, specs)

    def __repr__(self) -> str:
        return f"<DeviceServers {self.device.device_id}: running {self._running()}>"

    def share_with(self, groups: "Sequence[Sequence[DeviceServers]]") -> None:
        """Models that span devices share them: for each device that is used here, these are all servers on it."""
        self._sharing = groups

    # What a reload of the configuration and operators do.

    def replace(
        self,
        models: Mapping[str, ModelConfig],
        specs: Mapping[str, ChildSpec],
        patience_s: float,
        max_models: int = 1,
    ) -> list[str]:
        """Take over another configuration; return the models whose running server does not match it.

        Those servers run on until they are stopped; a start from now on follows the new configuration. A model that
        has failed and whose configuration changes may be started at once.
        """
        self._models, self._specs = models, specs
        self._memory.configure(models, specs)
        self._patience_s, self._max_models = patience_s, max_models
        for model_id, spec in self._started.items():
            if specs.get(model_id) != spec:
                self.reset_failure(model_id)
        outdated = [it for it in self._running() if not (self.serves(it) and self._runs_as(it, specs.get(it)))]
        self._outdated = set(outdated)
        return outdated

    def reset_failure(self, model_id: str) -> bool:
        """Let a model that has failed be started at once, as if it never had; return whether it had failed."""
        child = self._child(model_id)
        self._memory.forget_shortage(model_id)
        if child is None or child.state is not ChildState.FAILED:
            return False
        self._supervisor.forget(child.child_id)
        return True

    # What scheduling asks (scheduling.seam.Servers).

    def views(self) -> list[ServerView[Upstream]]:
        """Every server that runs, is about to, or has failed; a model whose file can't be used has failed too."""
        views = map(self.view, dict.fromkeys((*self._models, *self._started)))
        return [view for view in views if view is not None]

    def view(self, model_id: str) -> ServerView[Upstream] | None:
        """The same of one model."""
        model, child = self._models.get(model_id), self._child(model_id)
        if child is not None and child.state is ChildState.READY:
            return self._view_of_ready(model_id, model, child)
        if child is None or child.state is ChildState.STOPPED:
            problem = self._catalogue.problem(model_id)
            if model is None or problem is None or not runs_on(model, self.device):
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

    def obstacle(self, model_id: str) -> Obstacle | None:
        """What keeps this device from serving the model: it is no longer configured, is kept to other devices, does not
        fit, or has failed. A ready server that is configured as it runs shows that there is nothing."""
        model = self._models.get(model_id)
        if model is None:
            return Obstacle("it is no longer configured", reason_code=ReasonCode.NOT_CONFIGURED)
        if not runs_on(model, self.device):
            kept_to = " and ".join(model.devices) or "a single device"
            return Obstacle(f"it is kept to {kept_to}", reason_code=ReasonCode.KEPT_ELSEWHERE, elsewhere=True)
        child = self._child(model_id)
        if child is not None and child.state is ChildState.READY and model_id not in self._outdated:
            return None
        fit = self.fit(model_id)
        if fit is not None and fit.misfit is not None:
            return Obstacle(fit.misfit, reason_code=ReasonCode.DOES_NOT_FIT)
        crowded = self._memory.crowded_out(model_id, self._max_models)
        if crowded is not None:
            return Obstacle(crowded, reason_code=ReasonCode.NO_ROOM_BESIDE_PINNED)
        if child is not None and self._is_unnoted(child, model_id):
            return None  # `ensure` notes how much memory there was
        least_bytes = fit.least_bytes if fit is not None else None
        if least_bytes is not None and not (child is not None and child.is_active):
            most_bytes = self._memory.most_bytes(model_id)
            if most_bytes is not None and most_bytes < least_bytes:
                reason = self._memory.too_little(model_id, most_bytes, self._last_lines(child))
                return Obstacle(reason, reason_code=ReasonCode.OUT_OF_DEVICE_MEMORY)
            if most_bytes is not None and _ran_out(child):
                return None  # more can be made free than there was
        if child is None or child.retry_at is None:
            return None
        wait_s = child.retry_at - trio.current_time()
        if (child.state is ChildState.FAILED and wait_s > 0) or wait_s > self._patience_s:
            return Obstacle(self._with_figures(child, child.reason or "failed"), child.retry_at, code_of(child))
        return None

    def has_room(self, model_id: str, least_bytes: int = 0) -> bool:
        return self._memory.has_room(model_id, least_bytes)

    def memory_free_bytes(self) -> int | None:
        return self._memory.usable_bytes()

    def bytes_of(self, model_id: str) -> int:
        return self._memory.bytes_of(model_id)

    async def settled(self) -> None:
        for part in self.device.parts:
            await self._monitor.settled(part.device_id)

    async def ensure(self, model_id: str, beside: Collection[str] = (), make_room: MakeRoom | None = None) -> None:
        """Return when this device runs a ready server of the model, and no other but `beside`. See
        `scheduling.seam.Servers`."""
        await self._note_if_ran_out(model_id)
        await self._usable(model_id)
        if make_room is not None:
            await make_room()
        _model, spec = self._configured(model_id)
        stay = {it for it in self._running() if it in beside or (it == model_id and self._runs_as(it, spec))}
        to_stop = [other for other in self._running() if other not in stay]
        for other in to_stop:
            await self.stop(other)
        if to_stop:
            await self.settled()
        model, spec = self._configured(model_id)  # as it is now: a reload may have come in between
        if model_id in self._running():
            spec = self._started[model_id]
        else:
            self._prepare_try_after_shortage(model_id)
            self._outdated.discard(model_id)
        self._started[model_id] = spec
        try:
            await self._start(model, spec)
        except StartFailed as failure:
            child = self._child(model_id)
            retry_at = child.retry_at if child else None
            is_same = child is not None and child.generation == failure.generation
            lines = self._lines(failure.child_id) if is_same else failure.exit.last_lines
            said = last_words(lines, spec.argv)
            if failure.exit.cause is Cause.OUT_OF_DEVICE_MEMORY:
                raise await self._out_of_memory(model_id, failure.generation, failure.exit.reason, lines) from failure
            reason = self._with_figures(child, failure.exit.reason) if is_same else failure.exit.reason
            raise self._unavailable(model_id, reason, retry_at, said) from failure
        except GivenUp as failure:
            reason = self._with_figures(self._child(model_id), failure.reason)
            raise self._unavailable(model_id, reason, failure.retry_at) from failure

    async def _note_if_ran_out(self, model_id: str) -> None:
        """Raise OutOfDeviceMemory if the model's last server ran out of memory while it served, or nobody waited."""
        child = self._child(model_id)
        if child is not None and self._is_unnoted(child, model_id):
            lines = self._lines(child.child_id)
            raise await self._out_of_memory(model_id, child.generation, child.reason or "out of device memory", lines)

    async def _out_of_memory(
        self, model_id: str, generation: int, reason: str, lines: Sequence[str]
    ) -> OutOfDeviceMemory:
        """Note how much memory there was for the server that ran out of it, once its own is free again."""
        await self.settled()
        least_bytes = self._memory.note_shortage(model_id, self._started[model_id], lines)
        self._noted[model_id] = generation
        child = self._child(model_id)
        retry_at = child.retry_at if child is not None else None
        said = last_words(lines, self._argv(model_id))
        reason = self._memory.with_figures(model_id, reason, lines)
        return self._short_of_memory(model_id, reason, least_bytes, retry_at, said)

    def _prepare_try_after_shortage(self, model_id: str) -> None:
        """Let a model that ran out of memory be started again; raise OutOfDeviceMemory if no more is free now."""
        least_bytes, free_bytes = self._memory.least_bytes(model_id), self._memory.free_bytes()
        child = self._child(model_id)
        if least_bytes is None or free_bytes is None:
            return
        if free_bytes < least_bytes:
            reason = self._memory.too_little(model_id, free_bytes, self._last_lines(child))
            raise self._short_of_memory(model_id, reason, least_bytes, None)
        if child is not None and _ran_out(child):
            self._supervisor.forget(child.child_id)

    async def prepare(self, model_id: str) -> None:
        """Check the model's file, and read it into the page cache. See `scheduling.seam.Servers`."""
        model = await self._usable(model_id)
        size = await read_ahead(model.path)
        logger.debug("%s: reading ahead %d bytes of %s", self.device.device_id, size, model_id)

    async def stop(self, model_id: str) -> None:
        """Return once no server of that model runs. See `scheduling.seam.Servers`."""
        model, upstream = self._models.get(model_id), self._upstreams.get(model_id)
        if model is not None and upstream is not None:
            spec = self._specs[model_id]
            if spec == self._started.get(model_id):
                await self._hooks.before_stop(model, spec, upstream)
        await self._supervisor.stop(self._child_id(model_id))

    # What the rest of the node asks.

    def fit(self, model_id: str) -> Fit | None:
        """How the model fits here, None if nothing is known."""
        return self._memory.fit(model_id)

    def memory_most_bytes(self, model_id: str) -> int | None:
        """The free memory once all other models that may go are gone, without the reserve; None if unknown."""
        return self._memory.most_usable_bytes(model_id)

    def serves(self, model_id: str) -> bool:
        """Whether the configuration lets the model run here."""
        model = self._models.get(model_id)
        return model is not None and runs_on(model, self.device)

    def runs(self, model_id: str) -> bool:
        """Whether the model has a process here, or is about to get one."""
        return model_id in self._running()

    def measured_loads_s(self) -> dict[str, float]:
        """How long loads of the models took in earlier runs of the agent, where that was measured."""
        measurements = self._measurements
        if measurements is None:
            return {}
        loads = {
            model_id: measurements.load_s(model, self._specs[model_id]) for model_id, model in self._models.items()
        }
        return {model_id: load_s for model_id, load_s in loads.items() if load_s is not None}

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

    def _configured(self, model_id: str) -> tuple[ModelConfig, ChildSpec]:
        """The model and its child as they are configured now. Raises BackendUnavailable if a reload removed it."""
        if model_id not in self._models:
            raise self._unavailable(model_id, "it is no longer configured", None)
        return self._models[model_id], self._specs[model_id]

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
        return self._supervisor.child(self._child_id(model_id))

    def _running(self) -> list[str]:
        """The models whose child has a process, or is about to get one."""
        return list(self._running_children())

    def _running_children(self) -> dict[str, ChildSnapshot]:
        children = {model_id: self._child(model_id) for model_id in self._started}
        return {model_id: child for model_id, child in children.items() if child is not None and child.is_active}

    def _running_on(self) -> list[Mapping[str, ChildSnapshot]]:
        """The children on each device that is used here, those of other servers included that models share it with."""
        groups = ([servers._running_children() for servers in group] for group in self._sharing)
        return [dict(chain.from_iterable(running.items() for running in group)) for group in groups]

    def _runs_as(self, model_id: str, spec: ChildSpec | None) -> bool:
        """Whether that spec would give the same process as the running one. How a child is supervised (its restarts,
        its time-outs) may differ: that changes with its next start."""
        return spec is not None and _process(self._started[model_id]) == _process(spec)

    def _is_unnoted(self, child: ChildSnapshot, model_id: str) -> bool:
        """Whether the child has just run out of memory, and how much there was has not been noted yet."""
        if not _ran_out(child) or self._noted.get(model_id) == child.generation:
            return False
        return trio.current_time() - child.since <= _NOTED_WITHIN_S

    def _with_figures(self, child: ChildSnapshot | None, reason: str) -> str:
        """The reason, with the figures if the device's memory ran out."""
        if child is None or child.cause is not Cause.OUT_OF_DEVICE_MEMORY:
            return reason
        model_id = ServerId.parse(child.child_id).model_id
        return self._memory.with_figures(model_id, reason, self._lines(child.child_id))

    def _last_lines(self, child: ChildSnapshot | None) -> Sequence[str]:
        """What the child printed last, if it ran out of the device's memory."""
        return self._lines(child.child_id) if child is not None and _ran_out(child) else ()

    def _view_of_ready(self, model_id: str, model: ModelConfig | None, child: ChildSnapshot) -> ServerView[Upstream]:
        """Every request looks at it, and nothing about it changes while these are the same."""
        still_starting = model_id == self._still_starting
        upstream = self._upstreams.get(model_id)
        made_of = (model, child, upstream, still_starting, upstream.slot_ctx_size if upstream is not None else None)
        known = self._ready_views.get(model_id)
        if known is None or any(map(is_not, known[0], made_of)):
            view = view_of_child(model_id, model, child, made_of[2], still_starting=still_starting)
            known = self._ready_views[model_id] = made_of, view
        return known[1]

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

    def _short_of_memory(
        self,
        model_id: str,
        reason: str,
        least_bytes: int | None,
        retry_at: float | None,
        last_lines: Sequence[str] = (),
    ) -> OutOfDeviceMemory:
        retry_after_s = None if retry_at is None else max(0.0, retry_at - trio.current_time())
        reason = f"{self.device.device_id}: {reason}"
        return OutOfDeviceMemory(model_id, reason, least_bytes, retry_after_s, last_lines)

    def _unavailable(
        self, model_id: str, reason: str, retry_at: float | None, last_lines: Sequence[str] = ()
    ) -> BackendUnavailable:
        retry_after_s = None if retry_at is None else max(0.0, retry_at - trio.current_time())
        return BackendUnavailable(model_id, f"{self.device.device_id}: {reason}", retry_after_s, last_lines)


def _ran_out(child: ChildSnapshot | None) -> bool:
    """Whether the child has failed since the device's memory ran out."""
    return child is not None and child.state is ChildState.FAILED and child.cause is Cause.OUT_OF_DEVICE_MEMORY


def _process(spec: ChildSpec) -> tuple[object, ...]:
    """What of a spec determines the process."""
    return spec.argv, spec.env, spec.cpus, spec.cwd, spec.probe
