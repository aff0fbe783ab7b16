"""What a lane does to the servers of its device: the one load under way, and unloading."""

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

import trio

from nodeagent.errors import BackendUnavailable, Refusal
from nodeagent.scheduling.estimate import LaneTimes
from nodeagent.scheduling.host import Servers

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

    `on_end` is told each load that is over, with the refusal where it failed; `look_again` is called after whatever
    changes what can be granted. What changes: `current` in `begin` and in the load's own task, `_prepared` (the model
    that was last prepared for, until something is loaded) in `prepare` and `begin`, `_held` in who unloads, `_left` in
    `lease_is_back`.
    """

    def __init__(
        self,
        device_id: str,
        servers: Servers[E],
        times: LaneTimes,
        *,
        on_end: Callable[[Loading, Refusal | None], None],
        look_again: Callable[[], None],
    ) -> None:
        self.current: Loading | None = None
        self._device_id = device_id
        self._servers = servers
        self._times = times
        self._on_end = on_end
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

    def lease_is_back(self) -> None:
        """Wake whoever waits to unload a model in use."""
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

    def prepare(self, nursery: trio.Nursery, model_id: str) -> None:
        """The model is loaded next; what can be done for that while another is in use, is done, once."""
        if self._prepared != model_id and self.current is None:
            self._prepared = model_id
            nursery.start_soon(self._servers.prepare, model_id)

    def unload_soon(self, nursery: trio.Nursery, model_id: str) -> None:
        """Unload a model that is not in use; from now on nothing is granted on it."""
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

    async def _load(self, loading: Loading) -> None:
        refusal: Refusal | None = None
        try:
            with loading.scope:
                await self._servers.ensure(loading.model_id)
                self._times.loaded(loading.model_id, trio.current_time() - loading.began_at)
        except Refusal as why:
            logger.warning("%s: %s can't be loaded: %s", self._device_id, loading.model_id, why)
            refusal = why
        except Exception as error:
            # A fault of ours in one load must not end the node: those who wait are told, the next one tries again.
            logger.exception("%s: loading %s failed unexpectedly", self._device_id, loading.model_id)
            refusal = BackendUnavailable(loading.model_id, f"internal error: {error!r}")
        finally:
            self.current = None
            self._on_end(loading, refusal)
            self._look_again()
