"""The agent's watch over itself: whether its event loop and its lanes turn, and what the service manager is told of it.

Each round asks every lane for a turn. The watchdog is fed only if all of them have taken one by the end of the round;
that the round ends says that the event loop turns. A service manager that is not told so ends the agent and starts it
again.
"""

import logging
from collections.abc import Callable, Iterable
from typing import Final, Protocol

import trio

from nodeagent.service_manager import ServiceManager

logger = logging.getLogger(__name__)

# The longest round. A lane takes its turn within a millisecond; this is how old the status line may be.
ROUND_MAX_S: Final = 5.0
# While the agent stops, each round asks for time until some rounds later.
_ROUNDS_MISSED: Final = 4


class Turning(Protocol):
    """What has to go on turning (`scheduling.lane.Lane`): `nudge` makes it take a turn, `turns` counts them."""

    @property
    def device_id(self) -> str: ...

    @property
    def turns(self) -> int: ...

    def nudge(self) -> None: ...


class SelfWatch:
    """Watches `lanes`, and tells the service manager; `describe` is the agent's status in a line.

    What changes: `_is_stopping`, in `stop`; `_hung`, the lanes that took no turn in the last round, in `run`.
    """

    def __init__(self, manager: ServiceManager, lanes: Iterable[Turning], describe: Callable[[], str]) -> None:
        self._manager = manager
        self._lanes = list(lanes)
        self._describe = describe
        self._is_stopping = False
        self._hung: frozenset[str] = frozenset()
        watchdog_s = manager.watchdog_s
        self.round_s = ROUND_MAX_S if watchdog_s is None else min(watchdog_s / 2, ROUND_MAX_S)

    def stop(self) -> None:
        """The agent has begun to stop. Its lanes end when their requests have: from now on only the loop counts."""
        self._is_stopping = True
        self._manager.stopping()
        self._manager.extend(_ROUNDS_MISSED * self.round_s)

    async def run(self) -> None:
        """Watch until cancelled."""
        while True:
            before = {lane.device_id: lane.turns for lane in self._lanes}
            for lane in self._lanes:
                lane.nudge()
            await trio.sleep(self.round_s)
            await trio.lowlevel.checkpoint()  # after a pause of the whole process, the lanes come first
            if self._is_stopping:
                self._manager.extend(_ROUNDS_MISSED * self.round_s)
                self._manager.feed_watchdog()
            else:
                self._judge(frozenset(lane.device_id for lane in self._lanes if lane.turns == before[lane.device_id]))
            self._manager.flush()

    def _judge(self, hung: frozenset[str]) -> None:
        for device_id in sorted(hung - self._hung):
            logger.error("the lane of %s hangs: it has taken no turn for %g s", device_id, self.round_s)
        for device_id in sorted(self._hung - hung):
            logger.warning("the lane of %s turns again", device_id)
        self._hung = hung
        if hung:
            self._manager.status(f"the lane of {', '.join(sorted(hung))} hangs")
        else:
            self._manager.feed_watchdog()
            self._manager.status(self._describe())
