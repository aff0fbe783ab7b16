"""A server that is at work and makes no progress: it answers `/health`, and generates nothing.

Signs of life while requests are in flight, each enough by itself: a byte of an answer; the counts of `/slots` (tokens
of prompts processed, tokens decoded) move; on a CPU device the process uses CPU time. A server that shows none of them
for `stall_timeout_s` is replaced. Clients that lose their patience and come back are no sign of life, and the time
between them is none of silence: it does not count.

So a long prompt evaluation is told apart: on a CPU it uses CPU time all along, and on a GPU its counts move with each
batch. What can't be told apart is one single batch on a GPU that takes longer than the time-out, or several that each
outlast their clients: the server answers no look meanwhile. (A GPU server's CPU time says nothing: it spins while it
waits for the device.)
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

import httpx
import psutil
import trio

from nodeagent.llama_server.control import control_client
from nodeagent.llama_server.relay import Upstream

logger = logging.getLogger(__name__)

# Looks at `/slots` keep llama-server from noticing that the client of a non-streamed request left, if they come more
# often than once a second; so they are rare, and only made when nothing else shows life.
LOOK_INTERVAL_S = 5.0
_SLOTS_TIMEOUT_S = 2.0
_CPU_MOVES_S = 0.05
# Looks further apart than this were held up, together with the reading of answers (the agent was stopped, or its host
# was suspended): what was not seen is no evidence.
_LOOKS_APART_MAX_S = 60.0

Counts = tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Signs:
    """What was seen of a server at `at` (`trio.current_time()`). `counts` and `cpu_s` are None where not known."""

    at: float
    in_flight: int
    bytes_received: int
    counts: Counts | None = None
    cpu_s: float | None = None


class StallJudge:
    """How long a server has shown no sign of life while it was at work. Pure; what changes, changes in `observe`."""

    def __init__(self) -> None:
        self._silent_s = 0.0
        self._before: Signs | None = None
        self._counts: Counts | None = None

    def observe(self, now: Signs) -> float:
        """Take in a look; return for how many seconds of work there has been no sign of life, 0 for an idle server."""
        before, self._before = self._before, now
        if before is None or self._lives(before, now):
            self._silent_s = 0.0
        elif before.in_flight and now.in_flight and now.at - before.at <= _LOOKS_APART_MAX_S:
            self._silent_s += now.at - before.at
        if now.counts is not None:  # a look that timed out is no evidence, for or against
            self._counts = now.counts
        return self._silent_s if now.in_flight else 0.0

    def _lives(self, before: Signs, now: Signs) -> bool:
        if now.bytes_received != before.bytes_received:
            return True
        if now.cpu_s is not None and before.cpu_s is not None and now.cpu_s - before.cpu_s > _CPU_MOVES_S:
            return True
        return now.counts is not None and self._counts is not None and now.counts != self._counts


@dataclass(frozen=True, slots=True)
class Worker:
    """A ready server to be watched; `counts_cpu` says that its CPU time shows whether it works."""

    child_id: str
    generation: int
    pid: int
    upstream: Upstream
    stall_timeout_s: float
    counts_cpu: bool


class Looks(Protocol):
    """How a server is looked at."""

    async def __call__(self, worker: Worker, /, *, with_counts: bool) -> Signs: ...


async def look(worker: Worker, *, with_counts: bool) -> Signs:
    """Look at a server; its counts only if wanted, since asking for them is not free."""
    return Signs(
        trio.current_time(),
        worker.upstream.in_flight,
        worker.upstream.bytes_received,
        await _counts(worker.upstream) if with_counts else None,
        _cpu_s(worker.pid) if worker.counts_cpu else None,
    )


async def watch(
    workers: Callable[[], Iterable[Worker]], fail: Callable[[str, int, str], None], *, looks: Looks = look
) -> None:
    """Look at the ready servers at intervals until cancelled, and fail those that have stalled."""
    judges: dict[tuple[str, int], StallJudge] = {}
    silent_s: dict[tuple[str, int], float] = {}
    while True:
        await trio.sleep(LOOK_INTERVAL_S)
        current = {(worker.child_id, worker.generation): worker for worker in workers()}
        judges = {key: judges.get(key) or StallJudge() for key in current}
        for key, worker in current.items():
            # The counts are asked for in silence, and once before there is any: to see them move takes two.
            signs = await looks(worker, with_counts=silent_s.get(key, 1.0) > 0)
            silent_s[key] = judges[key].observe(signs)
            if silent_s[key] >= worker.stall_timeout_s:
                reason = f"no sign of progress for {silent_s[key]:.0f} s with {signs.in_flight} requests in flight"
                fail(worker.child_id, worker.generation, f"{reason} (stall_timeout_s)")
        silent_s = {key: silent_s[key] for key in current}


async def _counts(upstream: Upstream) -> Counts | None:
    """Task, prompt tokens processed and tokens decoded of each slot; None where the server does not say in time."""
    try:
        async with control_client(upstream.api_key, _SLOTS_TIMEOUT_S) as http:
            slots = (await http.get(f"http://{upstream.address}/slots")).json()
        return tuple(
            (
                int(slot.get("id_task", 0)),
                int(slot.get("n_prompt_tokens_processed", 0)),
                int((slot.get("next_token") or [{}])[0].get("n_decoded", 0)),
            )
            for slot in slots
        )
    except (httpx.HTTPError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        logger.debug("%s says nothing of its slots: %r", upstream.address, error)
        return None


def _cpu_s(pid: int) -> float | None:
    try:
        times = psutil.Process(pid).cpu_times()
    except (psutil.Error, OSError):  # gone, or no descriptor is left to look with
        return None
    return float(times.user + times.system)
