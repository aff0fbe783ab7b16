"""Looking whether a child is ready, and whether it still is well."""

import logging
import math
from typing import TYPE_CHECKING, Protocol

import trio

from supervisor.lifecycle import Cause, Failure

if TYPE_CHECKING:
    from supervisor.spawn import Process
    from supervisor.spec import LivenessPolicy

logger = logging.getLogger(__name__)

# The first look comes this soon after the spawn; the pauses then double. A tiny server is ready in 20 ms.
_FIRST_PAUSE_S = 0.01
# One look may take this long while the child starts; a server that is busy loading can be slow to answer.
_LOOK_TIMEOUT_S = 5.0
# One look could fall between a SIGSTOP and its SIGCONT.
LOOKS_STOPPED = 2
_SUSPENDED = "it is stopped by a signal"


class NotReady(Exception):
    """What a probe saw instead of a child that is ready; the message says it for people."""


class Suspended(NotReady):
    """A stop signal (SIGSTOP, a debugger) holds the child, so it can't become ready."""


class Probe(Protocol):
    """Knows how to ask one kind of child."""

    async def check(self, process: "Process") -> str:
        """Return the address at which the child answers (any text), or raise NotReady.

        Asked again and again, while the child starts and after. Must bear being cancelled.
        """


async def wait_ready(process: "Process", probe: Probe, interval_s: float, *, stopped_max_s: float = math.inf) -> str:
    """Return the child's address as soon as the probe passes; raise Suspended once a signal has stopped the child for
    `stopped_max_s`.

    Quick looks at first, then `interval_s` apart, and at once when the child prints something: what it prints last
    before it is ready is often just that. Never gives up by itself on a child that runs: cancel it.
    """
    pause_s = _FIRST_PAUSE_S
    ran_at = trio.current_time()
    while True:
        if not process.is_stopped():
            ran_at = trio.current_time()
        elif trio.current_time() - ran_at >= stopped_max_s:
            raise Suspended(_SUSPENDED)
        seen = process.output.count
        try:
            with trio.fail_after(_LOOK_TIMEOUT_S):
                return await probe.check(process)
        except NotReady as not_yet:
            logger.debug("%s is not ready: %s", process, not_yet)
        except trio.TooSlowError:
            logger.debug("%s is not ready: no answer within %g s", process, _LOOK_TIMEOUT_S)
        with trio.move_on_after(pause_s):
            await process.output.more_than(seen)
        pause_s = min(pause_s * 2, interval_s)


async def watch_liveness(process: "Process", probe: Probe, policy: "LivenessPolicy") -> Failure:
    """Return, with the reason, once the child has failed too many looks in a row.

    A child that a signal has stopped is not asked: its process state says it, and two looks are enough.
    """
    if policy.interval_s == math.inf:
        await trio.sleep_forever()
    failures = stopped = 0
    while True:
        await trio.sleep(policy.interval_s)
        stopped = stopped + 1 if process.is_stopped() else 0
        if stopped >= LOOKS_STOPPED:
            return Failure(Cause.SUSPENDED, _SUSPENDED)
        if stopped:
            continue
        reason = await _fault(process, probe, policy.timeout_s)
        failures = failures + 1 if reason else 0
        if reason:
            logger.debug("%s fails its liveness, %d of %d: %s", process, failures, policy.failures, reason)
        if failures >= policy.failures:
            return Failure(Cause.LIVENESS_FAILED, f"{failures} liveness probes in a row failed, the last: {reason}")


async def _fault(process: "Process", probe: Probe, timeout_s: float) -> str | None:
    try:
        with trio.fail_after(timeout_s):
            await probe.check(process)
    except NotReady as fault:
        return str(fault)
    except trio.TooSlowError:
        return f"no answer within {timeout_s:g} s"
    return None
