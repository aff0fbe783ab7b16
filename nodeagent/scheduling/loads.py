"""What a lane does with the servers of its device: the one load under way, and unloading."""

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence, Set
from functools import partial
from typing import Generic, TypeVar

import msgspec
import trio

from nodeagent.errors import BackendUnavailable, Refusal
from nodeagent.scheduling.estimates import LaneTimes
from nodeagent.scheduling.seam import Servers, ServerState, ServerView

logger = logging.getLogger(__name__)

E = TypeVar("E")


class Loading(msgspec.Struct):
    """A load under way, which leaves the servers of `beside` alone. `abandoned_at` is when the last request that waited
    for it left; None while one waits, and if none ever did (a preload, say)."""

    model_id: str
    beside: frozenset[str]
    began_at: float
    scope: trio.CancelScope
    abandoned_at: float | None = None


class Loads(Generic[E]):
    """The loads and unloads of one device.

    `on_end` is called after each load; `on_refusal` with each model that can't be loaded, and why; `look_again` after
    any change to what can be granted. `preloads` are the models to load as soon as no request wants another. For models
    that span devices, `take_devices` returns once these are held, and `make_room` once nothing is in the way there.

    What changes: `current` in `begin` and in the load's own task, `preloads` in `begin_preload` and `unload_idle`,
    `_prepared` (the model that was last prepared for, until something is loaded) in `prepare` and `begin`, `_held` in
    the unloads, `_used_at` (when the last lease of a model was returned) in `lease_returned`, `_displaced` (models that
    gave way and are to return) in `displaced`, `begin` and `unload_idle`.
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
        self.preloads: list[str] = []
        self._used_at: dict[str, float] = {}
        self._device_id = device_id
        self._servers = servers
        self._times = times
        self._on_end = on_end
        self._on_refusal = on_refusal
        self._look_again = look_again
        self.take_devices: Callable[[str], Awaitable[None]] | None = None
        self.make_room: Callable[[str], Awaitable[None]] | None = None
        self._prepared: str | None = None
        self._held: Counter[str] = Counter()
        self._displaced: list[str] = []
        self._wait_for_leases = trio.lowlevel.ParkingLot()

    def is_held(self, model_id: str) -> bool:
        """Whether the model is being unloaded, so that nothing may be granted on it."""
        return self._held[model_id] > 0

    def left_s(self) -> float:
        """How long the load under way still takes, by the measured times; 0 if there is none."""
        if self.current is None:
            return 0.0
        so_far_s = trio.current_time() - self.current.began_at
        return max(0.0, self._times.load_s(self.current.model_id) - so_far_s)

    def lease_returned(self, model_id: str, now: float) -> None:
        """A request on the model has ended: an unload that waits for it looks again."""
        self._used_at[model_id] = now
        self._wait_for_leases.unpark_all()

    def used_at(self, model_id: str) -> float:
        """When the last lease of the model was returned; 0 if none was."""
        return self._used_at.get(model_id, 0.0)

    def begin(self, nursery: trio.Nursery, model_id: str, reason: str, beside: frozenset[str] = frozenset()) -> bool:
        """Load the model beside those servers, and return True. If another load is under way, only cancel that one: its
        end makes the lane look again."""
        if self.current is not None:
            self.cancel()
            return False
        logger.info("%s: loading %s: %s", self._device_id, model_id, reason)
        self._prepared = None
        if model_id in self._displaced:
            self._displaced.remove(model_id)
        self.current = Loading(model_id, beside, trio.current_time(), trio.CancelScope())
        nursery.start_soon(self._load, self.current, name=f"load {model_id} on {self._device_id}")
        return True

    def cancel(self) -> None:
        """End the load under way; its end makes the lane look again."""
        if self.current is not None:
            self.current.scope.cancel()

    def displaced(self, model_ids: Iterable[str]) -> None:
        """These models give way to a load. They are preloaded again once a model has been unloaded for being idle."""
        self._displaced += [model_id for model_id in model_ids if model_id not in self._displaced]

    def begin_preload(self, nursery: trio.Nursery, beside: Callable[[str], frozenset[str]]) -> str | None:
        """No request is queued: load the next model that is to be preloaded, beside those of `beside`; return it."""
        if not self.preloads or self.current is not None:
            return None
        model_id = self.preloads.pop(0)
        self.begin(nursery, model_id, "preload", beside(model_id))
        return model_id

    def waiter_added(self, model_id: str) -> None:
        """A request waits for the model."""
        if self.current is not None and self.current.model_id == model_id:
            self.current.abandoned_at = None

    def waiter_left(self, model_id: str, still_wanted: Set[str]) -> None:
        """A request that waited for the model has left; `still_wanted` are the models of those that still wait."""
        if self.current is not None and self.current.model_id == model_id and model_id not in still_wanted:
            self.current.abandoned_at = trio.current_time()

    def end_abandoned(self, nursery: trio.Nursery, grace_s: float) -> float:
        """Cancel the load if no request has waited for it for `grace_s`; return when that will be."""
        load = self.current
        if load is None or load.abandoned_at is None or self.is_held(load.model_id):
            return math.inf
        if trio.current_time() < load.abandoned_at + grace_s:
            return load.abandoned_at + grace_s
        logger.info("%s: load of %s cancelled: no requests waiting", self._device_id, load.model_id)
        self._unload_soon(nursery, load.model_id)
        return math.inf

    def unload_idle(
        self, nursery: trio.Nursery, views: Sequence[ServerView[E]], busy: Set[str], grace_s: float
    ) -> float:
        """Unload the servers that have been idle for their `idle_unload_s`; return when the next one will have been.

        A server that was never used stays for `grace_s` at least: a client that was told to come back must find it.
        """
        now, next_at = trio.current_time(), math.inf
        for view in views:
            at_rest = view.state is ServerState.READY and view.model_id not in busy and not self.is_held(view.model_id)
            if not at_rest or view.idle_unload_s is None:
                continue
            used_at = self._used_at.get(view.model_id, -math.inf)
            is_used = used_at >= view.since
            idle_at = used_at + view.idle_unload_s if is_used else view.since + max(view.idle_unload_s, grace_s)
            if now < idle_at:
                next_at = min(next_at, idle_at)
            else:
                logger.info("%s: unloading %s: no request for %g s", self._device_id, view.model_id, view.idle_unload_s)
                self._unload_soon(nursery, view.model_id)
                self.preloads, self._displaced = [*self.preloads, *self._displaced], []
        return next_at

    def unload_surplus(self, nursery: trio.Nursery, model_ids: Iterable[str]) -> None:
        """Unload these models, which are idle: fewer may be loaded now."""
        for model_id in model_ids:
            if not self.is_held(model_id) and (self.current is None or self.current.model_id != model_id):
                logger.info("%s: unloading %s: fewer models may be loaded now", self._device_id, model_id)
                self._unload_soon(nursery, model_id)

    def prepare(self, nursery: trio.Nursery, model_id: str) -> None:
        """The model is loaded next: prepare that, once, while another model is in use."""
        if self._prepared != model_id and self.current is None:
            self._prepared = model_id
            nursery.start_soon(self._prepare, model_id, name=f"prepare {model_id} on {self._device_id}")

    def _unload_soon(self, nursery: trio.Nursery, model_id: str) -> None:
        """Unload a model that is not in use; from now on nothing is granted on it, even before the task has begun."""
        self._held[model_id] += 1
        nursery.start_soon(self._unload_held, model_id, name=f"unload {model_id} from {self._device_id}")

    async def unload(self, model_id: str, in_use: Callable[[], bool]) -> None:
        """Stop the model's server once it is no longer in use; return when it has stopped."""
        self._held[model_id] += 1
        await self._unload_held(model_id, in_use)

    async def _unload_held(self, model_id: str, in_use: Callable[[], bool] = lambda: False) -> None:
        try:
            while in_use():
                await self._wait_for_leases.park()
            if self.current is not None and self.current.model_id == model_id:
                # Cancelled, not failed: if a request waits for the model, it is loaded again afterwards.
                self.current.scope.cancel()
            await self._servers.stop(model_id)
        finally:
            self._held[model_id] -= 1
            self._look_again()

    async def _prepare(self, model_id: str) -> None:
        try:
            await self._servers.prepare(model_id)
        except Refusal as refusal:
            self._prepared = None  # the next request for it prepares it again
            self._refuse(model_id, refusal)

    async def _load(self, loading: Loading) -> None:
        refusal: Refusal | None = None
        try:
            with loading.scope:
                if self.take_devices is not None:
                    await self.take_devices(loading.model_id)
                    loading.began_at = trio.current_time()  # until then it waited for a turn
                was_ready = self._is_ready(loading.model_id)
                make_room = partial(self.make_room, loading.model_id) if self.make_room and not was_ready else None
                await self._servers.ensure(loading.model_id, loading.beside, make_room)
                if not was_ready:
                    self._times.loaded(loading.model_id, trio.current_time() - loading.began_at)
        except Refusal as why:
            refusal = why
        except Exception as error:
            # A bug in one load must not end the node: the requests that wait get an error, the next one tries again.
            logger.exception("%s: loading %s failed unexpectedly", self._device_id, loading.model_id)
            refusal = BackendUnavailable(loading.model_id, f"internal error: {error!r}")
        finally:
            self.current = None
            self._on_end(loading)
            if refusal is not None:
                self._refuse(loading.model_id, refusal)
            self._look_again()

    def _is_ready(self, model_id: str) -> bool:
        return any(view.model_id == model_id and view.state is ServerState.READY for view in self._servers.views())

    def _refuse(self, model_id: str, refusal: Refusal) -> None:
        logger.warning("%s: %s can't be loaded: %s", self._device_id, model_id, refusal)
        self._on_refusal(model_id, refusal)
