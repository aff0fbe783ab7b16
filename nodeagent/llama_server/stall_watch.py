"""Finds a server that has stalled: it answers `/health`, its answers are waited for, and it makes no progress on them.

Signs of progress, each enough by itself: a byte of a response; the counts of `/slots` (prompt tokens processed, tokens
decoded) change; on a CPU device the process uses CPU time. A server that shows none of them for `stall_timeout_s` is
replaced. Clients that give up and retry are no sign of progress, and the time between their requests does not count.
Nor does the time in which the agent waits for nothing of the server, since clients don't read what it has sent.

A long prompt evaluation is not mistaken for a stall: on a CPU it uses CPU time, and on a GPU the counts change with
each batch. What can't be distinguished is a single batch on a GPU that takes longer than the time-out, or several that
each outlast their clients: meanwhile the server does not answer `/slots`. (The CPU time of a GPU server means nothing:
it spins while it waits for the device.)
"""

import logging
from collections.abc import Callable, Iterable
from typing import Protocol

import msgspec
import psutil
import trio

from nodeagent.containment import Containment
from nodeagent.llama_server.control import ControlError, ask
from nodeagent.llama_server.relay import Upstream

logger = logging.getLogger(__name__)

# More than one `/slots` request per second keeps llama-server from noticing that the client of a non-streamed request
# left. So they are rare, and only sent if nothing else shows progress.
OBSERVE_INTERVAL_S = 5.0
# More than the time-out of one request to a server, which a server that answers byte by byte could draw out for ever.
OBSERVE_TIMEOUT_S = 4.0
_SLOTS_TIMEOUT_S = 2.0
# A slot takes 2 KB, and what the client gave it as a grammar.
_SLOTS_MAX_BYTES = 4 * 1024 * 1024
# A server that only answers probes uses less CPU time than this between two observations.
_CPU_USED_S = 0.05
# Observations further apart were held up, and the reading of responses with them (the agent or the host was suspended):
# what was not observed is no evidence.
_GAP_MAX_S = 60.0

Counts = tuple[tuple[int, int, int], ...]


class Observation(msgspec.Struct, frozen=True, kw_only=True):
    """A server at `at` (`trio.current_time()`). `awaited` counts the requests of which something more is waited for;
    `counts` and `cpu_s` are None if unknown."""

    at: float
    awaited: int
    bytes_received: int
    counts: Counts | None = None
    cpu_s: float | None = None


class StallDetector:
    """Measures how long a busy server has made no progress. Pure; what changes, changes in `add`."""

    def __init__(self) -> None:
        self._stalled_s = 0.0
        self._last: Observation | None = None
        self._counts: Counts | None = None

    def add(self, now: Observation) -> float:
        """Add an observation; return for how many seconds the server has been busy without progress, 0 if idle."""
        before, self._last = self._last, now
        if before is None or self._has_progressed(before, now):
            self._stalled_s = 0.0
        elif before.awaited and now.awaited and now.at - before.at <= _GAP_MAX_S:
            self._stalled_s += now.at - before.at
        if now.counts is not None:  # no answer is no evidence, for or against
            self._counts = now.counts
        return self._stalled_s if now.awaited else 0.0

    def _has_progressed(self, before: Observation, now: Observation) -> bool:
        if now.bytes_received != before.bytes_received:
            return True
        if now.cpu_s is not None and before.cpu_s is not None and now.cpu_s - before.cpu_s > _CPU_USED_S:
            return True
        return now.counts is not None and self._counts is not None and now.counts != self._counts


class Worker(msgspec.Struct, frozen=True, kw_only=True):
    """A ready server to be watched; `counts_cpu` means that its CPU time shows whether it makes progress."""

    child_id: str
    generation: int
    pid: int
    upstream: Upstream
    stall_timeout_s: float
    counts_cpu: bool


class Observe(Protocol):
    """Observes a server, as `observe` does."""

    async def __call__(self, worker: Worker, /, *, with_counts: bool) -> Observation: ...


async def observe(worker: Worker, *, with_counts: bool) -> Observation:
    """Observe a server; `with_counts` asks it for its slots, which is not free."""
    return Observation(
        at=trio.current_time(),
        awaited=worker.upstream.awaited,
        bytes_received=worker.upstream.bytes_received,
        counts=await _counts(worker.upstream) if with_counts else None,
        cpu_s=_cpu_s(worker.pid) if worker.counts_cpu else None,
    )


async def watch(
    workers: Callable[[], Iterable[Worker]], fail: Callable[[str, int, str], None], *, observe: Observe = observe
) -> None:
    """Observe the ready servers at intervals until cancelled, and call `fail` for those that have stalled.

    Each server is observed in a task of its own, for at most `OBSERVE_TIMEOUT_S`: one that answers slowly, or with what
    can't be read, does not keep the others from being watched. Having seen nothing is no sign of progress.
    """
    containment = Containment("watching a server for stalls")
    detectors: dict[tuple[str, int], StallDetector] = {}
    stalled_s: dict[tuple[str, int], float] = {}
    while True:
        await trio.sleep(OBSERVE_INTERVAL_S)
        current = {(worker.child_id, worker.generation): worker for worker in workers()}
        detectors = {key: detectors.get(key) or StallDetector() for key in current}
        seen: dict[tuple[str, int], Observation] = {}

        async def observe_one(
            key: tuple[str, int], worker: Worker, with_counts: bool, seen: dict[tuple[str, int], Observation]
        ) -> None:
            with containment, trio.move_on_after(OBSERVE_TIMEOUT_S):
                seen[key] = await observe(worker, with_counts=with_counts)

        async with trio.open_nursery() as nursery:
            for key, worker in current.items():
                # With counts only while there is no progress, and the first time: a change shows only between two.
                with_counts = stalled_s.get(key, 1.0) > 0
                nursery.start_soon(observe_one, key, worker, with_counts, seen, name=f"observe {worker.child_id}")
        for key, worker in current.items():
            observation = seen.get(key) or _nothing_seen(worker)
            stalled_s[key] = detectors[key].add(observation)
            if stalled_s[key] >= worker.stall_timeout_s:
                silent = f"no sign of progress for {stalled_s[key]:.0f} s"
                reason = f"{silent} with {observation.awaited} requests in flight (stall_timeout_s)"
                fail(worker.child_id, worker.generation, reason)
        stalled_s = {key: stalled_s[key] for key in current}


def _nothing_seen(worker: Worker) -> Observation:
    """An observation without an answer of the server: what the agent itself counts."""
    upstream = worker.upstream
    return Observation(at=trio.current_time(), awaited=upstream.awaited, bytes_received=upstream.bytes_received)


class _NextToken(msgspec.Struct):
    n_decoded: int = 0


class _Slot(msgspec.Struct):
    """The part of a slot that shows progress."""

    id_task: int = 0
    n_prompt_tokens_processed: int = 0
    next_token: list[_NextToken] | None = None

    @property
    def decoded(self) -> int:
        return self.next_token[0].n_decoded if self.next_token else 0


async def _counts(upstream: Upstream) -> Counts | None:
    """Task, prompt tokens processed and tokens decoded of each slot; None if the server does not tell them in time."""
    try:
        reply = await ask(
            upstream.address, upstream.api_key, "/slots", timeout_s=_SLOTS_TIMEOUT_S, max_bytes=_SLOTS_MAX_BYTES
        )
        slots = reply.read_as(list[_Slot])
    except ControlError as error:
        logger.debug("no slots from %s: %s", upstream.address, error)
        return None
    return tuple((slot.id_task, slot.n_prompt_tokens_processed, slot.decoded) for slot in slots)


def _cpu_s(pid: int) -> float | None:
    try:
        times = psutil.Process(pid).cpu_times()
    except (psutil.Error, OSError):  # the process is gone, or no file descriptor is free to read with
        return None
    return float(times.user + times.system)
