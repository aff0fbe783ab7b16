"""Which models may be resident on a device at the same time, and which of them give way to another. Pure."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations

import msgspec

# Up to so many residents every combination is compared (256 at most); of more only the cheapest few, added one by one.
_COMPARED_MAX = 8


class ServerUse(msgspec.Struct, frozen=True, kw_only=True):
    """A server of the device as a policy sees it.

    `slots` is how many requests it may serve at once, `in_flight` how many of them are in use; `beside_slots` are the
    requests in flight that need no slot (to count tokens, say), but the server all the same. `since` is when it entered
    its state (became ready, for example), `used_at` when a request on it last ended. `held`: it is being
    unloaded, and nothing more may be granted on it. `backing_off`: its next start is not due yet. `resident`: it has a
    process or is about to get one. `pinned`: it gives way to no other model.
    """

    ready: bool
    slots: int
    in_flight: int
    held: bool = False
    since: float = 0.0
    used_at: float = 0.0
    backing_off: bool = False
    resident: bool = True
    pinned: bool = False
    beside_slots: int = 0

    @property
    def in_use(self) -> bool:
        """Whether a request is in flight on it, so that it may not be stopped."""
        return bool(self.in_flight or self.beside_slots)


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What a device has room for.

    At most `max_models` models are resident; with `concurrent` they serve requests at the same time. `free_bytes` is
    the free memory, None if unknown; `bytes_of` says what a server of a model takes of it, 0 if unknown.
    """

    max_models: int = 1
    concurrent: bool = False
    free_bytes: int | None = None
    bytes_of: Callable[[str], int] = lambda _model_id: 0

    def leaving(
        self, wanted: str, servers: Mapping[str, ServerUse], *, reload_s: Callable[[str], float], now: float
    ) -> frozenset[str] | None:
        """The models that give way to a load of `wanted`; None if pinned ones leave no room for it.

        They are the smallest set that suffices, of idle models if there is such a set. Among equals those go whose
        reload is cheap for the time that they have been idle. Where not even all of them suffice, all go: the memory
        that a model needs is an estimate.
        """
        others = [model_id for model_id, use in servers.items() if model_id != wanted and use.resident]
        movable = [model_id for model_id in others if not servers[model_id].pinned]
        if self.max_models == 1:
            return frozenset(movable) if len(movable) == len(others) else None
        is_resident = wanted in servers and servers[wanted].resident
        short_bytes = 0 if is_resident or self.free_bytes is None else self.bytes_of(wanted) - self.free_bytes
        surplus = len(others) + 1 - self.max_models

        def worth(model_id: str) -> float:
            use = servers[model_id]
            # Of models in use always the same has to become idle: if that changed with each request that ends, models
            # that are kept busy would never give way.
            idle_s = 0.0 if use.in_use else now - max(use.used_at, use.since)
            return reload_s(model_id) / (1.0 + idle_s)

        in_use = None
        for gone in _sets(sorted(movable, key=lambda model_id: (servers[model_id].in_use, worth(model_id)))):
            if len(gone) < surplus or sum(map(self.bytes_of, gone)) < short_bytes:
                continue
            if not any(servers[model_id].in_use for model_id in gone):
                return frozenset(gone)
            in_use = in_use or frozenset(gone)
        if in_use is not None:
            return in_use
        return frozenset(movable) if len(movable) == len(others) else None

    def surplus(
        self, servers: Mapping[str, ServerUse], *, reload_s: Callable[[str], float], now: float
    ) -> frozenset[str]:
        """The idle models that go since more are resident than may be now."""
        resident = [model_id for model_id, use in servers.items() if use.resident]
        if len(resident) <= self.max_models:
            return frozenset()
        one_more = msgspec.structs.replace(self, max_models=self.max_models + 1)
        leaving = one_more.leaving("", servers, reload_s=reload_s, now=now) or frozenset()
        return frozenset(model_id for model_id in leaving if not servers[model_id].in_use)


def staying(wanted: str, servers: Mapping[str, ServerUse], leaving: frozenset[str]) -> frozenset[str]:
    """The resident models that a load of `wanted` leaves alone, if these give way to it."""
    return frozenset(model_id for model_id, use in servers.items() if use.resident) - leaving - {wanted}


def _sets(models: Sequence[str]) -> Iterator[Sequence[str]]:
    """Sets of these models, smaller ones first; of sets of the same size those first whose models come first."""
    for size in range(len(models) + 1):
        if len(models) <= _COMPARED_MAX:
            yield from combinations(models, size)
        else:
            yield models[:size]
