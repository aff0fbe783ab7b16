"""What a lane does to the servers of its device: the one load under way, and unloading."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Set
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from nodeagent.errors import BackendUnavailable, Refusal
from nodeagent.scheduling.estimates import LaneTimes
from nodeagent.scheduling.seam import Servers, ServerState

logger = logging.getLogger(__name__)

E = TypeVar("E")


@dataclass(slots=True)
class Loading:
    """A load under way. `nobody_since` is when the last request that waited for it left, None while one waits (or
    where nobody ever did: it was ordered)."""

    model_id: str
    began_at: float
    scope: trio.CancelScope
    nobody_since: float | None = None


class Loads(Generic[E]):
    """The loads and unloads of one device.

    `on_end` is told each load that is over; `on_refusal` each model that can't be loaded, and why; `look_again` is
    called after whatever changes what can be granted. `preload` is a model to load as soon as nobody wants another.

    What changes: `current` in `begin` and in the load's own task, `preload` in `begin_preload`, `_prepared` (the model
    that was last prepared for, until something is loaded) in `prepare` and `begin`, `_held` in who unloads, `used_at`
    (when the last lease of a model came back) and `_left` in `lease_is_back`.
    """

    def __init__(
        self,
        device_id: str,
        servers: Servers[E],
        times: LaneTimes,
        *,
        on_end: Callable[[Loading], None],
        on_refusal: Callable[[str, Refusal], None],
        look_again: Callable[[], None],
    ) -> None:
        self.current: Loading | None = None
        self.preload: str | None = None
        self.used_at: dict[str, float] = {}
        self._device_id = device_id
        self._servers = servers
        self._times = times
        self._on_end = on_end
        self._on_refusal = on_refusal
        self._look_again = look_again
        self._prepared: str | None = None
        self._held: Counter[str] = Counter()
        self._left = trio.Event()

    def is_held(self, model_id: str) -> bool:
        """Whether the model is being unloaded, so that nothing may be granted on it."""
        return self._held[model_id] > 0

    def left_s(self) -> float:
        """What the load under way still takes, by the measured times; 0 if there is none."""
        if self.current is None:
            return 0.0
        so_far_s = trio.current_time() - self.current.began_at
        return max(0.0, self._times.load_s(self.current.model_id) - so_far_s)

    def lease_is_back(self, model_id: str) -> None:
        """A request on the model has ended: whoever waits to unload it looks again."""
        self.used_at[model_id] = trio.current_time()
        self._left.set()
        self._left = trio.Event()

    def begin(self, nursery: trio.Nursery, model_id: str, reason: str) -> None:
        """Load the model; if another load is under way, only call that off: its end has the lane look again."""
        if self.current is not None:
            self.current.scope.cancel()
            return
        logger.info("%s: loading %s: %s", self._device_id, model_id, reason)
        self._prepared = None
        self.current = Loading(model_id, trio.current_time(), trio.CancelScope())
        nursery.start_soon(self._load, self.current)

    def begin_preload(self, nursery: trio.Nursery) -> None:
        """Nobody wants anything: load what is to be ready before anybody does."""
        if self.preload is not None and self.current is None:
            model_id, self.preload = self.preload, None
            self.begin(nursery, model_id, "preload")

    def one_came(self, model_id: str) -> None:
        """Somebody waits for the model."""
        if self.current is not None and self.current.model_id == model_id:
            self.current.nobody_since = None

    def one_left(self, model_id: str, still_wanted: Set[str]) -> None:
        """Somebody who waited for the model has left, and only those models are waited for still."""
        if self.current is not None and self.current.model_id == model_id and model_id not in still_wanted:
            self.current.nobody_since = trio.current_time()

    def end_abandoned(self, nursery: trio.Nursery, grace_s: float) -> float:
        """Call off the load if everyone has left it, and that for so long; return when that will be."""
        load = self.current
        if load is None or load.nobody_since is None or self.is_held(load.model_id):
            return math.inf
        if trio.current_time() < load.nobody_since + grace_s:
            return load.nobody_since + grace_s
        logger.info("%s: not loading %s any more: nobody waits for it", self._device_id, load.model_id)
        self._unload_soon(nursery, load.model_id)
        return math.inf

    def unload_idle(self, nursery: trio.Nursery, busy: Set[str], grace_s: float) -> float:
        """Unload what has been idle for as long as its model may be; return when the next one will have been.

        `grace_s` is for a server that nobody has used yet: who was told to come back for it needs to find it.
        """
        now, next_at = trio.current_time(), math.inf
        for view in self._servers.views():
            at_rest = view.state is ServerState.READY and view.model_id not in busy and not self.is_held(view.model_id)
            if not at_rest or view.idle_unload_s is None:
                continue
            used_at = self.used_at.get(view.model_id, -math.inf)
            is_used = used_at >= view.since
            idle_at = used_at + view.idle_unload_s if is_used else view.since + max(view.idle_unload_s, grace_s)
            if now < idle_at:
                next_at = min(next_at, idle_at)
            else:
                logger.info("%s: unloading %s: no request for %g s", self._device_id, view.model_id, view.idle_unload_s)
                self._unload_soon(nursery, view.model_id)
        return next_at

    def prepare(self, nursery: trio.Nursery, model_id: str) -> None:
        """The model is loaded next; what can be done for that while another is in use, is done, once."""
        if self._prepared != model_id and self.current is None:
            self._prepared = model_id
            nursery.start_soon(self._prepare, model_id)

    def _unload_soon(self, nursery: trio.Nursery, model_id: str) -> None:
        """Unload a model that is not in use; from now on, before the task has begun too, nothing is granted on it."""
        self._held[model_id] += 1
        nursery.start_soon(self._unload_held, model_id)

    async def unload(self, model_id: str, in_use: Callable[[], bool]) -> None:
        """Stop the model's server once it is not in use any more; return when it is."""
        self._held[model_id] += 1
        await self._unload_held(model_id, in_use)

    async def _unload_held(self, model_id: str, in_use: Callable[[], bool] = lambda: False) -> None:
        try:
            while in_use():
                await self._left.wait()
            if self.current is not None and self.current.model_id == model_id:
                # Called off, it is no failure: who waits for the model has it loaded again afterwards.
                self.current.scope.cancel()
            await self._servers.stop(model_id)
        finally:
            self._held[model_id] -= 1
            self._look_again()

    async def _prepare(self, model_id: str) -> None:
        try:
            await self._servers.prepare(model_id)
        except Refusal as refusal:
            self._prepared = None  # the next request for it has it looked at again
            self._refuse(model_id, refusal)

    async def _load(self, loading: Loading) -> None:
        refusal: Refusal | None = None
        try:
            with loading.scope:
                await self._servers.ensure(loading.model_id)
                self._times.loaded(loading.model_id, trio.current_time() - loading.began_at)
        except Refusal as why:
            refusal = why
        except Exception as error:
            # A fault of ours in one load must not end the node: those who wait are told, the next one tries again.
            logger.exception("%s: loading %s failed unexpectedly", self._device_id, loading.model_id)
            refusal = BackendUnavailable(loading.model_id, f"internal error: {error!r}")
        finally:
            self.current = None
            self._on_end(loading)
            if refusal is not None:
                self._refuse(loading.model_id, refusal)
            self._look_again()

    def _refuse(self, model_id: str, refusal: Refusal) -> None:
        logger.warning("%s: %s can't be loaded: %s", self._device_id, model_id, refusal)
        self._on_refusal(model_id, refusal)
