"""Asking a child whether it is ready, and later whether it is still well."""

import logging
import math
from dataclasses import dataclass
from typing import Protocol

import trio

from supervisor.containment import Containment, described, own_shortage
from supervisor.errors import NotReady, ProbeUnavailable, SupervisorError
from supervisor.lifecycle import Cause, Failure
from supervisor.output import Output

__all__ = ["LivenessPolicy", "NotReady", "Probe", "ProbeUnavailable", "ProcessView", "wait_ready", "watch_liveness"]

logger = logging.getLogger(__name__)

# The first pause between two probes of a starting child; it doubles each time. A tiny server is ready in 20 ms.
_FIRST_PAUSE_S = 0.01
# Probes are at least this far apart, however much the child prints.
_MIN_PAUSE_S = 0.005
# How long one probe of a starting child may take; a server that is busy loading can be slow to answer.
_START_PROBE_TIMEOUT_S = 5.0
# How many probes in a row must find a child suspended: a single one can fall between a SIGSTOP and its SIGCONT.
SUSPENDED_PROBES = 2
_SUSPENDED = "suspended by a stop signal"
# Between two warnings that a child can't be probed.
_WARN_EVERY_S = 60.0


class ProcessView(Protocol):
    """What a probe sees of a process."""

    @property
    def generation(self) -> int: ...

    @property
    def pid(self) -> int: ...

    @property
    def output(self) -> Output: ...

    def group_pids(self) -> list[int]:
        """The processes of its process group, which it leads itself."""

    def is_suspended(self) -> bool: ...


class Probe(Protocol):
    """Knows how to ask one kind of child whether it is well."""

    async def check(self, process: ProcessView) -> str:
        """Return the address at which the child answers (any text), or raise NotReady.

        Raise ProbeUnavailable if it can't be asked for want of something of our own. An error whose cause is out of
        file descriptors or memory counts as that, whatever its type. Any other error fails a start at once, and a
        ready child as NotReady does.

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
    process: ProcessView,
    probe: Probe,
    interval_s: float,
    *,
    timeout_s: float = math.inf,
    timeout_at: float = math.inf,
    suspended_max_s: float = math.inf,
) -> str | Failure:
    """Return the child's address as soon as its probe passes, or why this start has failed: at `timeout_at`, which is
    `timeout_s` after the spawn, or once a stop signal has held the child for `suspended_max_s`.

    The first probes come quickly, the later ones `interval_s` apart, and one comes at once when the child prints
    something: often the last line before it is ready says just that. What it prints is not looked at.
    """
    pause_s = _FIRST_PAUSE_S
    ran_at = trio.current_time()
    found: str | SupervisorError = NotReady("it was not probed")
    with trio.move_on_at(timeout_at):
        while True:
            if not process.is_suspended():
                ran_at = trio.current_time()
            elif trio.current_time() - ran_at >= suspended_max_s:
                return Failure(Cause.SUSPENDED, f"not ready: {_SUSPENDED}")
            seen, probed_at = process.output.count, trio.current_time()
            found = await _probed(process, probe, _START_PROBE_TIMEOUT_S)
            if isinstance(found, str):
                return found
            logger.debug("%s is not ready: %s", process, found)
            with trio.move_on_after(pause_s):
                await process.output.more_than(seen)
            await trio.sleep_until(probed_at + _MIN_PAUSE_S)
            pause_s = min(pause_s * 2, interval_s)
    late = f"not ready {timeout_s:g} s after its spawn"
    if isinstance(found, ProbeUnavailable):
        return Failure(Cause.OWN_SHORTAGE, f"{late}, and it could not be probed: {found}")
    return Failure(Cause.START_TIMEOUT, f"{late}: {found}")


async def watch_liveness(process: ProcessView, probe: Probe, policy: LivenessPolicy, errors: Containment) -> Failure:
    """Return why the child has failed, once too many probes in a row have.

    A suspended child is not probed: the operating system says so, and being found suspended twice is enough. A probe
    that can't ask for want of something of our own changes nothing.
    """
    if policy.interval_s == math.inf:
        await trio.sleep_forever()
    failures = suspended = 0
    warned_at = -math.inf
    while True:
        await trio.sleep(policy.interval_s)
        suspended = suspended + 1 if process.is_suspended() else 0
        if suspended >= SUSPENDED_PROBES:
            return Failure(Cause.SUSPENDED, _SUSPENDED)
        if suspended:
            continue
        match await _liveness(process, probe, policy, errors):
            case ProbeUnavailable() as shortage:
                if trio.current_time() >= warned_at + _WARN_EVERY_S:
                    logger.warning("%s can't be probed, which does not count: %s", process, shortage)
                    warned_at = trio.current_time()
            case str():
                failures = 0
            case fault:
                failures += 1
                logger.debug("%s: liveness probe %d of %d failed: %s", process, failures, policy.failures, fault)
                if failures >= policy.failures:
                    reason = f"{failures} liveness probes in a row failed, the last: {fault}"
                    return Failure(Cause.LIVENESS_FAILED, reason)


async def _liveness(
    process: ProcessView, probe: Probe, policy: LivenessPolicy, errors: Containment
) -> str | SupervisorError:
    """Probe the child once; an unforeseen error is one failed probe."""
    found: str | SupervisorError = NotReady("unforeseen error")

    def failed(error: Exception) -> None:
        nonlocal found
        found = NotReady(f"unexpected error: {described(error)}")

    with errors.contained("a liveness probe", failed):
        found = await _probed(process, probe, policy.timeout_s)
    return found


async def _probed(process: ProcessView, probe: Probe, timeout_s: float) -> str | SupervisorError:
    """Probe the child once; return its address, or NotReady or ProbeUnavailable. Raises what nobody foresaw."""
    try:
        with trio.fail_after(timeout_s):
            return await probe.check(process)
    except ProbeUnavailable as unavailable:
        return unavailable
    except trio.TooSlowError:
        return NotReady(f"no answer within {timeout_s:g} s")
    except Exception as error:
        shortage = own_shortage(error)
        if shortage is not None:
            return ProbeUnavailable(shortage)
        if isinstance(error, NotReady):
            return error
        raise
