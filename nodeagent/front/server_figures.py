"""What the servers themselves tell in figures: how full their KV caches are (`/slots`), and what they have done
(`/metrics`)."""

import math
from collections import defaultdict
from collections.abc import Mapping
from typing import Final
from weakref import WeakKeyDictionary

import msgspec
import trio

from nodeagent.errors import BackendUnavailable
from nodeagent.front.tallies import Tallies
from nodeagent.front.window import Window
from nodeagent.llama_server.relay import Upstream
from nodeagent.scheduling.scheduler import Scheduler

# Nobody waits longer for the metrics because of a server that does not answer.
_PATIENCE_S: Final = 1.0

COUNTERS: Final = {
    "prompt_tokens": "prompt_tokens_total",
    "prompt_seconds": "prompt_seconds_total",
    "generation_tokens": "tokens_predicted_total",
    "generation_seconds": "tokens_predicted_seconds_total",
    "decode_calls": "n_decode_total",
}
"""Our names of the servers' counters, and llama-server's, without its prefix."""

_PREFIX: Final = "llamacpp:"
_OUR_NAMES: Final = {f"{_PREFIX}{theirs}": ours for ours, theirs in COUNTERS.items()}

Labels = tuple[str, str]


class _Slot(msgspec.Struct):
    """A slot of llama-server. Its tokens stay in its cache afterwards, but only those of a request in progress count:
    the others make room for the next one."""

    n_ctx: int = 0
    is_processing: bool = False
    n_prompt_tokens: int = 0


class ServerFigures:
    """The figures of each server when it was last asked, by device and model.

    A server that generates an answer that is not streamed is not asked: it would not notice its client's leaving.
    `counters` are the sums over all servers of a model on a device, one after the other; what one has done since it was
    last asked is missing once it has ended.

    What changes: these; `_caches` (tokens in use and tokens that fit); `_told`, the counters that a server told last;
    all in `refresh`.
    """

    def __init__(self, scheduler: Scheduler[Upstream], tallies: Tallies, slots: Window, metrics: Window) -> None:
        self.counters = defaultdict[Labels, dict[str, float]](lambda: dict.fromkeys(COUNTERS, 0.0))
        self._scheduler = scheduler
        self._tallies = tallies
        self._slots = slots
        self._metrics = metrics
        self._caches = WeakKeyDictionary[Upstream, tuple[int, int]]()
        self._told = WeakKeyDictionary[Upstream, Mapping[str, float]]()

    async def refresh(self) -> None:
        """Ask the servers that may be asked, as far as what they said last is old."""
        with trio.move_on_after(_PATIENCE_S):
            async with trio.open_nursery() as nursery:
                for device_id, model_id, server in self._scheduler.ready_servers():
                    if not self._tallies.whole_in_flight[model_id]:
                        labels = (device_id, model_id)
                        nursery.start_soon(self._ask, labels, server, name=f"figures of {model_id} on {device_id}")

    def cache_use(self) -> tuple[float, dict[Labels, float]]:
        """The use of all KV caches together, from 0 to 1, and of each; of a server that has told nothing yet there is
        none."""
        used, size, of_each = 0, 0, dict[Labels, float]()
        for device_id, model_id, server in self._scheduler.ready_servers():
            if server in self._caches:
                server_used, server_size = self._caches[server]
                of_each[device_id, model_id] = server_used / server_size
                used, size = used + server_used, size + server_size
        return (used / size if size else 0.0), of_each

    async def _ask(self, labels: Labels, server: Upstream) -> None:
        slots = await _look(self._slots, labels, server)
        if slots is not None:
            self._note_slots(server, slots)
        counters = await _look(self._metrics, labels, server)
        if counters is not None:
            self._note_counters(labels, server, counters_in(counters))

    def _note_slots(self, server: Upstream, content: bytes) -> None:
        try:
            slots = msgspec.json.decode(content, type=list[_Slot])
        except msgspec.MsgspecError:
            return
        size = sum(max(0, slot.n_ctx) for slot in slots)
        if size:
            self._caches[server] = sum(_used(slot) for slot in slots), size

    def _note_counters(self, labels: Labels, server: Upstream, told: Mapping[str, float]) -> None:
        before = self._told.get(server, {})
        sums = self.counters[labels]
        for name, value in told.items():
            sums[name] += max(0.0, value - before.get(name, 0.0))
        self._told[server] = {**before, **told}


async def _look(window: Window, labels: Labels, server: Upstream) -> bytes | None:
    """What the server answers there; None if it does not, or was started without that (`--no-slots`)."""
    try:
        status, content = await window.look(labels[1], server)
    except BackendUnavailable:
        return None
    return content if status == 200 else None


def counters_in(content: bytes) -> dict[str, float]:
    """The counters of a server in its answer to `/metrics`, under our names."""
    found = {}
    for line in content.decode("utf-8", "replace").splitlines():
        name, _, value = line.partition(" ")
        if name in _OUR_NAMES:
            try:
                number = float(value)
            except ValueError:
                continue
            if math.isfinite(number):
                found[_OUR_NAMES[name]] = number
    return found


def _used(slot: _Slot) -> int:
    return max(0, min(slot.n_prompt_tokens, slot.n_ctx)) if slot.is_processing else 0
