"""How full the KV caches of the servers are, by their `/slots`."""

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


class _Slot(msgspec.Struct):
    """A slot of llama-server. Its tokens stay in its cache afterwards, but only those of a request in progress count:
    the others make room for the next one."""

    n_ctx: int = 0
    is_processing: bool = False
    n_prompt_tokens: int = 0


class KvUse:
    """The use of each server's cache when it was last asked. What changes: `_seen` (tokens in use and tokens that fit),
    in `refresh`.

    A server that generates an answer that is not streamed is not asked: it would not notice its client's leaving.
    """

    def __init__(self, scheduler: Scheduler[Upstream], tallies: Tallies, slots: Window) -> None:
        self._scheduler = scheduler
        self._tallies = tallies
        self._slots = slots
        self._seen = WeakKeyDictionary[Upstream, tuple[int, int]]()

    async def refresh(self) -> None:
        """Ask the servers that may be asked, as far as what they said last is old."""
        with trio.move_on_after(_PATIENCE_S):
            async with trio.open_nursery() as nursery:
                for device_id, model_id, server in self._scheduler.ready_servers():
                    if not self._tallies.whole_in_flight[model_id]:
                        nursery.start_soon(self._ask, model_id, server, name=f"slots of {model_id} on {device_id}")

    def ratios(self) -> tuple[float, dict[tuple[str, str], float]]:
        """The use of all caches together, from 0 to 1, and of each by device and model; of a server that has told
        nothing yet there is none."""
        used, size, of_each = 0, 0, dict[tuple[str, str], float]()
        for device_id, model_id, server in self._scheduler.ready_servers():
            if server in self._seen:
                server_used, server_size = self._seen[server]
                of_each[device_id, model_id] = server_used / server_size
                used, size = used + server_used, size + server_size
        return (used / size if size else 0.0), of_each

    async def _ask(self, model_id: str, server: Upstream) -> None:
        try:
            status, content = await self._slots.look(model_id, server)
            if status != 200:  # it was started with --no-slots
                return
            slots = msgspec.json.decode(content, type=list[_Slot])
        except (BackendUnavailable, msgspec.MsgspecError):
            return
        size = sum(max(0, slot.n_ctx) for slot in slots)
        if size:
            self._seen[server] = sum(_used(slot) for slot in slots), size


def _used(slot: _Slot) -> int:
    return max(0, min(slot.n_prompt_tokens, slot.n_ctx)) if slot.is_processing else 0
