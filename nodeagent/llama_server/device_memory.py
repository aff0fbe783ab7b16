"""The memory of one device: what is free of it, what each model takes, and what a load that ran out of it showed."""

from collections.abc import Callable, Mapping, Sequence
from operator import is_not

from nodeagent.config import ModelConfig
from nodeagent.devices.values import DeviceRef
from nodeagent.gguf.header import GgufHeader
from nodeagent.llama_server.allocations import asked_bytes
from nodeagent.llama_server.fit import Fit, fit_of, part_on, readable, shortage
from nodeagent.llama_server.seams import DeviceReadings, Measurements, ModelFiles
from nodeagent.llama_server.spans import runs_on
from supervisor.snapshot import ChildSnapshot, ChildState
from supervisor.spec import ChildSpec

_MadeOf = tuple[GgufHeader, ModelConfig, int]

# A server in these states will take memory of which it may have none yet.
_COMING = frozenset({ChildState.STARTING, ChildState.BACKING_OFF})
# A reading of a device's free memory differs from the next by a little: more than that has to be free for another try
# of a load that ran out of memory.
_SLACK_BYTES = 64 * 2**20


class DeviceMemory:
    """`running` are the children that run, or are about to, by model, on each device that is used here: one, or all
    that models span. `spans` are the groups that this device belongs to. An unknown size is None.

    Of several devices together nothing is known to be free: the lanes of these make room, each on its own device.

    What changes: `_models` and `_specs` in `configure`; `_fits`, which keeps what every request asks, in `fit`.
    """

    def __init__(
        self,
        device: DeviceRef,
        running: Callable[[], Sequence[Mapping[str, ChildSnapshot]]],
        *,
        spans: Sequence[DeviceRef] = (),
        catalogue: ModelFiles,
        monitor: DeviceReadings,
        measurements: Measurements | None,
    ) -> None:
        self._device = device
        self._running_on = running
        self._spans = spans
        self._catalogue = catalogue
        self._monitor = monitor
        self._measurements = measurements
        self._models: Mapping[str, ModelConfig] = {}
        self._specs: Mapping[str, ChildSpec] = {}
        self._fits: dict[str, tuple[_MadeOf, Fit]] = {}

    def configure(self, models: Mapping[str, ModelConfig], specs: Mapping[str, ChildSpec]) -> None:
        """Take over another configuration."""
        self._models, self._specs = models, specs

    # What models take.

    def fit(self, model_id: str) -> Fit | None:
        """How the model fits here, None if nothing is known. Every request asks, so the answer is kept."""
        header, model = self._catalogue.header(model_id), self._models.get(model_id)
        if header is None or model is None:
            return None
        made_of = (header, model, self._measurements.changes if self._measurements is not None else 0)
        known = self._fits.get(model_id)
        if known is None or any(map(is_not, known[0], made_of)):
            measured_bytes = least_bytes = None
            if self._measurements is not None:
                spec = self._specs[model_id]
                measured_bytes = self._measurements.memory_bytes(model, spec)
                least_bytes = self._measurements.least_bytes(model, spec)
            fit = fit_of(header, model, self._device, measured_bytes, least_bytes)
            known = self._fits[model_id] = made_of, fit
        return known[1]

    def bytes_of(self, model_id: str) -> int:
        """What a server of the model takes here, 0 if unknown."""
        fit = self.fit(model_id)
        if fit is None:
            return 0
        model = self._models[model_id]
        span = None if runs_on(model, self._device) else self._span_of(model)
        return int(fit.needed_bytes * part_on(model, self._device, span))

    def _span_of(self, model: ModelConfig) -> DeviceRef | None:
        """The devices that the model spans, if this is one of them."""
        own = self._device.device_id
        found = (span for span in self._spans if tuple(it.device_id for it in span.members) == model.devices)
        return next((span for span in found if own in model.devices), None)

    # What is free.

    def free_bytes(self) -> int | None:
        """What is free by the last reading, what is reserved for others included.

        Without what our servers are about to take, or have taken since that reading: else the next load would count on
        memory that is not there any more.
        """
        if self._device.members:
            return None
        reading = self._monitor.latest(self._device.device_id)
        if reading is None or reading.memory_free_bytes is None:
            return None
        coming = [
            model_id
            for model_id, child in self._running().items()
            if child.state in _COMING or child.since > reading.measured_at
        ]
        return max(0, reading.memory_free_bytes - sum(map(self.bytes_of, coming)))

    def usable_bytes(self) -> int | None:
        """What is free for models: without the reserve."""
        if self._device.members:
            return None
        free_bytes, running = self.free_bytes(), self._running()
        if free_bytes is None and running and self._device.memory_total_bytes is not None:
            # Not measured (the driver hangs, or has no such figure): at least our own servers are not free memory.
            free_bytes = self._device.memory_total_bytes - sum(map(self.bytes_of, running))
        return self._without_reserve(free_bytes)

    def most_bytes(self, model_id: str) -> int | None:
        """What is free once all other models that may go are gone, what is reserved for others included."""
        free_bytes = self.free_bytes()
        if free_bytes is None:
            return None
        movable = (other for other in self._running() if other != model_id and not self._is_pinned(other))
        return free_bytes + sum(map(self.bytes_of, movable))

    def most_usable_bytes(self, model_id: str) -> int | None:
        """The same without the reserve."""
        return self._without_reserve(self.most_bytes(model_id))

    def has_room(self, model_id: str, least_bytes: int = 0) -> bool:
        """See `scheduling.seam.Servers`."""
        usable_bytes = self.usable_bytes()
        if usable_bytes is None:
            return True
        movable = (other for other in self._running() if not self._is_pinned(other))
        needed_bytes = max(least_bytes, self.bytes_of(model_id))
        return needed_bytes <= usable_bytes + sum(map(self.bytes_of, movable))

    def crowded_out(self, model_id: str, max_models: int) -> str | None:
        """Why the pinned models that run here leave no room for this one."""
        if not any(model.pinned for model in self._models.values()):
            return None
        for running in self._running_on():
            pinned = [other for other in running if other != model_id and self._is_pinned(other)]
            if model_id in running or not pinned:
                continue
            reason = self._left_by(pinned, model_id, max_models)
            if reason is not None:
                return reason
        return None

    def _left_by(self, pinned: Sequence[str], model_id: str, max_models: int) -> str | None:
        """Why these models, which stay, leave no room for this one."""
        names = ", ".join(pinned)
        if len(pinned) >= max_models:
            return f"all places for models are taken by pinned ones ({names})"
        total = None if self._device.members else self._without_reserve(self._device.memory_total_bytes)
        if total is not None and sum(map(self.bytes_of, [*pinned, model_id])) > total:
            return f"the pinned models ({names}) leave too little memory"
        most_bytes = self.most_usable_bytes(model_id)
        if most_bytes is not None and self.bytes_of(model_id) > most_bytes:
            return f"the pinned models ({names}) and other programs leave too little memory"
        return None

    # Loads that run out of it.

    def least_bytes(self, model_id: str) -> int | None:
        """What has to be free at least for a model that ran out of memory; None if it did not."""
        fit = self.fit(model_id)
        return fit.least_bytes if fit is not None else None

    def note_shortage(self, model_id: str, spec: ChildSpec, lines: Sequence[str]) -> int | None:
        """The model's load, with that spec, ran out of what is free now, and printed these lines. Return what it needs
        at least, as far as is known."""
        free_bytes, asked = self.free_bytes(), asked_bytes(lines)
        known = [] if free_bytes is None else [free_bytes + _SLACK_BYTES]
        least_bytes = max([*known, *([] if asked is None else [asked])], default=None)
        model = self._models.get(model_id)
        if model is not None and least_bytes is not None and self._measurements is not None:
            self._measurements.ran_out(model, spec, least_bytes)
        return least_bytes

    def forget_shortage(self, model_id: str) -> None:
        """Let the model be loaded again, whatever it needed the last time."""
        model = self._models.get(model_id)
        if model is not None and self._measurements is not None:
            self._measurements.ran_out(model, self._specs[model_id], None)

    def too_little(self, model_id: str, most_bytes: int, lines: Sequence[str]) -> str:
        """Why a model that ran out of memory is not loaded again, as long as no more than that can be free."""
        least_bytes = self.least_bytes(model_id) or 0
        reason = (
            f"out of device memory: a load showed that at least {readable(least_bytes)} have to be free, and at most "
            f"{readable(most_bytes)} can be"
        )
        return self.with_figures(model_id, reason, lines)

    def with_figures(self, model_id: str, reason: str, lines: Sequence[str]) -> str:
        """The reason, with what is known of the memory. `lines` are the last ones of the server that ran out of it."""
        header, model = self._catalogue.header(model_id), self._models.get(model_id)
        figures = shortage(header, model, self._device, self.usable_bytes(), asked_bytes(lines))
        return f"{reason}; {figures}" if figures else reason

    def _running(self) -> Mapping[str, ChildSnapshot]:
        """The children on the device, if it is one."""
        [running] = self._running_on()
        return running

    def _is_pinned(self, model_id: str) -> bool:
        model = self._models.get(model_id)
        return model is not None and model.pinned

    def _without_reserve(self, size_bytes: int | None) -> int | None:
        return None if size_bytes is None else max(0, size_bytes - self._device.memory_reserve_bytes)
