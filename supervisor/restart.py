"""Whether and when a child is restarted: restart intensity as in Erlang/OTP, with back-off. Pure.

After more than `max_restarts` exits within `period_s` the tracker gives up. After `cooldown_s` it is half-open: the
next requested start is allowed, and if that one fails too, the tracker gives up again at once.

A start that failed for a shortage of the supervisor's own is repeated with back-off and counts as nothing.
"""

import random
from collections import deque
from dataclasses import dataclass
from typing import Literal

from supervisor.lifecycle import Cause, Exit

# More doublings change nothing, since every delay has long reached its maximum, and would overflow a float.
_DOUBLINGS_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """`mode` is OTP's: a permanent child is always restarted, a transient one unless it exited with 0, a temporary one
    never.

    The first restart of a child that was ready is immediate. Later restarts wait `backoff_initial_s`, doubled each
    time up to `backoff_max_s`, with jitter. A child that was ready for `reset_after_s` starts with a clean record.

    A child that ended for a cause in `no_restart` is given up on at once, since the same arguments would end the same
    way; after `cooldown_s` it may be started on request.
    """

    mode: Literal["permanent", "transient", "temporary"] = "permanent"
    max_restarts: int = 3
    period_s: float = 60.0
    backoff_initial_s: float = 1.0
    backoff_max_s: float = 60.0
    reset_after_s: float = 300.0
    cooldown_s: float = 60.0
    no_restart: frozenset[Cause] = frozenset({Cause.OUT_OF_MEMORY, Cause.OUT_OF_DEVICE_MEMORY})


@dataclass(frozen=True, slots=True)
class Restart:
    """Start the child again after `delay_s`."""

    delay_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Don't restart the child. From `retry_at` on it may be started on request; None: its mode forbids a restart, but
    it may be started on request at any time."""

    reason: str
    retry_at: float | None


class RestartTracker:
    """The recent exits of one child. Times are monotonic, in seconds. It outlives stops and starts of the child.

    What changes: `_exits`, `_delays_given`, `_shortages` and `_half_open`, in `decide` and `half_open`.
    """

    def __init__(self, policy: RestartPolicy, rng: random.Random | None = None) -> None:
        self._policy = policy
        self._random = rng or random.Random()
        self._exits: deque[float] = deque()
        self._delays_given = 0
        self._shortages = 0
        self._half_open = False

    def decide(self, exit: Exit, now: float) -> Restart | GiveUp:
        """What to do after this exit of the child."""
        policy = self._policy
        if exit.cause in policy.no_restart:
            self._count(exit, now)
            return GiveUp(f"{exit.reason}; not restarted with the same arguments", now + policy.cooldown_s)
        if policy.mode == "temporary" or (policy.mode == "transient" and exit.code == 0):
            return GiveUp(f"{exit.reason}; not restarted, its restart mode is {policy.mode}", None)
        if exit.cause is Cause.OWN_SHORTAGE:
            delay_s = self._jittered(self._shortages)
            self._shortages += 1
            return Restart(delay_s, f"{exit.reason}; restart in {delay_s:.1f} s, which does not count")
        self._shortages = 0
        self._count(exit, now)
        if self._half_open:
            return GiveUp(f"{exit.reason}; given up: the start after the cool-down failed", now + policy.cooldown_s)
        if len(self._exits) > policy.max_restarts:
            exits = f"{len(self._exits)} exits in {policy.period_s:g} s"
            return GiveUp(f"{exit.reason}; given up: {exits}", now + policy.cooldown_s)
        delay_s = self._delay(was_ready=exit.ready_s is not None)
        exits = f"{len(self._exits)} of {policy.max_restarts} in {policy.period_s:g} s"
        return Restart(delay_s, f"{exit.reason}; restart in {delay_s:.1f} s: {exits}")

    def half_open(self) -> None:
        """Allow one start after giving up: if it fails, `decide` gives up again at once."""
        self._half_open = True
        self._exits.clear()
        self._delays_given = 0

    def _count(self, exit: Exit, now: float) -> None:
        if exit.ready_s is not None:
            self._half_open = False
            if exit.ready_s >= self._policy.reset_after_s:
                self._exits.clear()
                self._delays_given = 0
        self._exits.append(now)
        while self._exits[0] <= now - self._policy.period_s:
            self._exits.popleft()

    def _delay(self, *, was_ready: bool) -> float:
        if was_ready and len(self._exits) == 1:
            self._delays_given = 0
            return 0.0
        self._delays_given += 1
        return self._jittered(self._delays_given - 1)

    def _jittered(self, doublings: int) -> float:
        policy = self._policy
        longest = min(policy.backoff_max_s, policy.backoff_initial_s * 2.0 ** min(doublings, _DOUBLINGS_MAX))
        # Half of the delay is jitter, so that children that failed together don't all restart together.
        return longest * self._random.uniform(0.5, 1.0)
