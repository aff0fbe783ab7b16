"""Whether and when an ended child is started again: restart intensity as in Erlang/OTP, with back-off. Pure.

More than `max_restarts` ends within `period_s` and the tracker gives up. After `cooldown_s` it is half-open: one start
is allowed to whoever asks for it, and if that fails too it gives up again at once.
"""

import random
from collections import deque
from dataclasses import dataclass
from typing import Literal

from supervisor.lifecycle import Exit

# Doubled that often, any delay is at its longest; much more often, and it would be more than a float can hold.
_DOUBLINGS_MAX = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """`mode` has OTP's words: permanent is always restarted, transient unless it ended well, temporary never.

    The first restart of a child that had been ready is immediate; the next ones wait `backoff_initial_s`, doubling up
    to `backoff_max_s`, with jitter. A child that stays ready for `reset_after_s` starts afresh.
    """

    mode: Literal["permanent", "transient", "temporary"] = "permanent"
    max_restarts: int = 3
    period_s: float = 60.0
    backoff_initial_s: float = 1.0
    backoff_max_s: float = 60.0
    reset_after_s: float = 300.0
    cooldown_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Restart:
    """Start it again after `delay_s`."""

    delay_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """Leave it ended. At `retry_at` one start may be asked for; None: no start is called for at all."""

    reason: str
    retry_at: float | None


class RestartTracker:
    """The memory of one child's ends. `now` is monotonic, in seconds. Kept over stops and starts of the child.

    What changes: `_ends`, `_delays_given` and `_half_open`, in `decide` and `try_again`.
    """

    def __init__(self, policy: RestartPolicy, rng: random.Random | None = None) -> None:
        self._policy = policy
        self._random = rng or random.Random()
        self._ends: deque[float] = deque()
        self._delays_given = 0
        self._half_open = False

    def decide(self, end: Exit, now: float) -> Restart | GiveUp:
        """What follows on this end of the child."""
        policy = self._policy
        if policy.mode == "temporary" or (policy.mode == "transient" and end.code == 0):
            return GiveUp(f"{end.reason}; it is {policy.mode}", None)
        if end.ready_s is not None and end.ready_s >= policy.reset_after_s:
            self._ends.clear()
            self._delays_given = 0
        if end.ready_s is not None:
            self._half_open = False
        self._ends.append(now)
        while self._ends[0] <= now - policy.period_s:
            self._ends.popleft()
        if self._half_open or len(self._ends) > policy.max_restarts:
            return GiveUp(self._intensity(end), now + policy.cooldown_s)
        delay_s = self._delay(was_ready=end.ready_s is not None)
        return Restart(delay_s, f"{end.reason}; restart in {delay_s:.1f} s: {self._count()}")

    def try_again(self) -> None:
        """A start is made after giving up: if it fails, that is enough to give up again."""
        self._half_open = True
        self._ends.clear()
        self._delays_given = 0

    def _delay(self, *, was_ready: bool) -> float:
        policy = self._policy
        if was_ready and len(self._ends) == 1:
            self._delays_given = 0
            return 0.0
        longest = min(policy.backoff_max_s, policy.backoff_initial_s * 2.0 ** min(self._delays_given, _DOUBLINGS_MAX))
        self._delays_given += 1
        # Half of it is jitter, so that the children of a host that fell together don't come back together.
        return longest * self._random.uniform(0.5, 1.0)

    def _intensity(self, end: Exit) -> str:
        if self._half_open:
            return f"{end.reason}; the one try after the cool-down failed"
        return f"{end.reason}; given up: {len(self._ends)} ends in {self._policy.period_s:g} s"

    def _count(self) -> str:
        return f"{len(self._ends)} of {self._policy.max_restarts} in {self._policy.period_s:g} s"
