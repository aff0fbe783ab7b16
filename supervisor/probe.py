"""Asking a child whether it is ready, and later whether it is still well."""

import logging
import math
from dataclasses import dataclass
from typing import Protocol

import trio

from supervisor.errors import NotReady, Suspended
from supervisor.lifecycle import Cause, Failure
from supervisor.output import Output

__all__ = ["LivenessPolicy", "NotReady", "Probe", "ProcessView", "wait_ready", "watch_liveness"]

logger = logging.getLogger(__name__)

# The first pause between two probes of a starting child; it doubles each time. A tiny server is ready in 20 ms.
_FIRST_PAUSE_S = 0.01
# How long one probe of a starting child may take; a server that is busy loading can be slow to answer.
_START_PROBE_TIMEOUT_S = 5.0
# How many probes in a row must find a child suspended: a single one can fall between a SIGSTOP and its SIGCONT.
SUSPENDED_PROBES = 2
_SUSPENDED = "suspended by a stop signal"


class ProcessView(Protocol):
    """What a probe sees of a process."""

    @property
    def generation(self) -> int: ...

    @property
    def output(self) -> Output: ...

    def is_suspended(self) -> bool: ...


class Probe(Protocol):
    """Knows how to ask one kind of child whether it is well."""

    async def check(self, process: ProcessView) -> str:
        """Return the address at which the child answers (any text), or raise NotReady.

        Called again and again, while the child starts and afterwards. May be cancelled at any checkpoint.
        """


@dataclass(frozen=True, slots=True)
class LivenessPolicy:
    """A ready child is probed every `interval_s`. If `failures` probes in a row fail, or take longer than
    `timeout_s`, the child is unhealthy and is replaced. An infinite interval switches the probes off."""

    interval_s: float = 5.0
    timeout_s: float = 5.0
    failures: int = 3


async def wait_ready(
    process: ProcessView, probe: Probe, interval_s: float, *, suspended_max_s: float = math.inf
) -> str:
    """Return the child's address as soon as its probe passes; raise Suspended once a stop signal has held the child
    for `suspended_max_s`.

    The first probes come quickly, the later ones `interval_s` apart, and one comes at once when the child prints
    something: often the last line before it is ready says just that. There is no time-out here: cancel it.
    """
    pause_s = _FIRST_PAUSE_S
    ran_at = trio.current_time()
    while True:
        if not process.is_suspended():
            ran_at = trio.current_time()
        elif trio.current_time() - ran_at >= suspended_max_s:
            raise Suspended(_SUSPENDED)
        seen = process.output.count
        try:
            with trio.fail_after(_START_PROBE_TIMEOUT_S):
                return await probe.check(process)
        except NotReady as not_yet:
            logger.debug("%s is not ready: %s", process, not_yet)
        except trio.TooSlowError:
            logger.debug("%s is not ready: no answer within %g s", process, _START_PROBE_TIMEOUT_S)
        with trio.move_on_after(pause_s):
            await process.output.more_than(seen)
        pause_s = min(pause_s * 2, interval_s)


async def watch_liveness(process: ProcessView, probe: Probe, policy: LivenessPolicy) -> Failure:
    """Return why the child has failed, once too many probes in a row have.

    A suspended child is not probed: the operating system says so, and being found suspended twice is enough.
    """
    if policy.interval_s == math.inf:
        await trio.sleep_forever()
    failures = suspended = 0
    while True:
        await trio.sleep(policy.interval_s)
        suspended = suspended + 1 if process.is_suspended() else 0
        if suspended >= SUSPENDED_PROBES:
            return Failure(Cause.SUSPENDED, _SUSPENDED)
        if suspended:
            continue
        reason = await _probe_fault(process, probe, policy.timeout_s)
        failures = failures + 1 if reason else 0
        if reason:
            logger.debug("%s: liveness probe %d of %d failed: %s", process, failures, policy.failures, reason)
        if failures >= policy.failures:
            return Failure(Cause.LIVENESS_FAILED, f"{failures} liveness probes in a row failed, the last: {reason}")


async def _probe_fault(process: ProcessView, probe: Probe, timeout_s: float) -> str | None:
    """Probe the child once; return what is wrong with it, None if nothing is."""
    try:
        with trio.fail_after(timeout_s):
            await probe.check(process)
    except NotReady as fault:
        return str(fault)
    except trio.TooSlowError:
        return f"no answer within {timeout_s:g} s"
    return None
