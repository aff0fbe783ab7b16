"""Real children of a real supervisor: small scripts that say when they are ready."""

import os
import sys
from typing import Any

import psutil
import trio

from supervisor.lifecycle import Event
from supervisor.probe import NotReady, ProcessView
from supervisor.restart import RestartPolicy
from supervisor.spec import ChildSpec, StopPolicy
from supervisor.supervisor import ChildState, Supervisor

QUICK = RestartPolicy(backoff_initial_s=0.02, backoff_max_s=0.05, max_restarts=2, cooldown_s=0.3)
READY_THEN_SLEEP = "print('at home', flush=True)\nimport time\ntime.sleep(60)"


class PrintedAddress:
    """A child is ready once it printed `at <address>`, and well unless it is suspended."""

    async def check(self, process: ProcessView) -> str:
        if process.is_suspended():
            raise NotReady("suspended")
        for line in process.output.lines():
            if line.startswith("at "):
                return line.removeprefix("at ")
        raise NotReady("it has not printed its address")


PRINTED_ADDRESS = PrintedAddress()


class Watched:
    """A supervisor, and all that it reports."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.lines: list[str] = []
        self._changed = trio.Event()
        self.supervisor = Supervisor(on_event=self._on_event, on_line=lambda _id, _gen, line: self.lines.append(line))

    def _on_event(self, event: Event) -> None:
        self.events.append(event)
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, kind: type[Event], count: int = 1) -> Any:
        while True:
            found = [event for event in self.events if isinstance(event, kind)]
            if len(found) >= count:
                return found[count - 1]
            await self._changed.wait()

    def state(self, child_id: str = "child") -> ChildState:
        return self.supervisor.snapshot()[child_id].state


def spec(script: str, *, child_id: str = "child", **more: Any) -> ChildSpec:
    defaults: dict[str, Any] = {"start_timeout_s": 10.0, "restart": QUICK, "stop": StopPolicy(grace_s=2.0)}
    argv = (sys.executable, "-S", "-c", script)
    facts: dict[str, Any] = {"child_id": child_id, "group": "group", "argv": argv, "env": dict(os.environ)}
    return ChildSpec(**facts, probe=PRINTED_ADDRESS, **(defaults | more))


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
