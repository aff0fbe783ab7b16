"""Processes that are a table, for the supervisor's real state machine in virtual time."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import trio

from supervisor.output import Output
from supervisor.probe import NotReady, ProcessView
from supervisor.spawner import ChildProcess


@dataclass(frozen=True, kw_only=True)
class Fate:
    """What becomes of a process. Times are seconds after its spawn, None for never.

    It is ready, exits by itself with `code`, fails its probe, leaves its probe without an answer, or is suspended.
    `prints`: its last lines before that. `out_of_memory`: the limit for which the kernel kills it.
    `broken_by`: what these methods raise. `ignores_sigterm`: only SIGKILL ends it. `hangs_in_a_driver`: not even that
    does, and the supervisor gives up on it.
    """

    ready_after_s: float | None = 0.0
    exits_after_s: float | None = None
    code: int = 1
    prints: bytes = b""
    ill_after_s: float | None = None
    hangs_after_s: float | None = None
    suspended_after_s: float | None = None
    ignores_sigterm: bool = False
    hangs_in_a_driver: bool = False
    out_of_memory: str | None = None
    broken_by: Mapping[str, Exception] = field(default_factory=dict)


@dataclass
class FakeProcess:
    """As `supervisor.spawn.Process`, without a process."""

    name: str
    generation: int
    fate: Fate
    on_line: Callable[[str], None]
    on_exit: Callable[[], None] = lambda: None
    pid: int = 1
    returncode: int | None = None
    ended: trio.Event = field(default_factory=trio.Event)
    killed_by: int | None = None

    def __post_init__(self) -> None:
        self.spawned_at = trio.current_time()
        self.output = Output(self.on_line)
        self._killed = trio.Event()

    def __str__(self) -> str:
        return f"{self.name} (generation {self.generation}, pid {self.pid})"

    def has(self, after_s: float | None) -> bool:
        """Whether that much time has passed since the spawn."""
        return after_s is not None and trio.current_time() >= self.spawned_at + after_s

    def is_suspended(self) -> bool:
        return self.has(self.fate.suspended_after_s)

    def kill(self, signum: int = 9) -> None:
        self.killed_by = signum
        self._killed.set()

    def group_pids(self) -> list[int]:
        return [self.pid]

    def out_of_memory(self) -> str | None:
        return self.fate.out_of_memory

    def reap_strays(self, _others: Collection[int]) -> None:
        self._break("reap_strays")

    def _break(self, method: str) -> None:
        if method in self.fate.broken_by:
            raise self.fate.broken_by[method]

    async def attend(self) -> None:
        lifetime_s = float("inf") if self.fate.exits_after_s is None else self.fate.exits_after_s
        with trio.CancelScope(shield=True):
            with trio.move_on_at(self.spawned_at + lifetime_s):
                await self._killed.wait()
            if self.fate.prints:
                self.output.feed(self.fate.prints)
            if not self.fate.hangs_in_a_driver:
                self.returncode = self.fate.code if self.killed_by is None else -self.killed_by
            self.on_exit()
            self.ended.set()
        self._break("attend")

    async def terminate(self, grace_s: float) -> None:
        self._break("terminate")
        if self.ended.is_set():
            return
        if self.is_suspended():
            self.kill(9)
        elif not self.fate.ignores_sigterm:
            self.kill(15)
        else:
            with trio.move_on_after(grace_s):
                await self._killed.wait()
            self.kill(9)
        await self.ended.wait()


class FateProbe:
    """Answers from the fate of the process, and remembers when it was called."""

    def __init__(self) -> None:
        self.called_at: list[float] = []

    async def check(self, process: ProcessView) -> str:
        self.called_at.append(trio.current_time())
        fake = cast(FakeProcess, process)
        if fake.has(fake.fate.hangs_after_s):
            await trio.sleep_forever()
        if fake.has(fake.fate.ill_after_s):
            raise NotReady("ill")
        if not fake.has(fake.fate.ready_after_s):
            raise NotReady("not yet")
        return f"address {process.generation}"


class FakeSpawner:
    """Starts fake processes with these fates in turn, then with that of `afterwards`. An exception fails the spawn."""

    def __init__(self, fates: Iterable[Fate | Exception] = (), *, afterwards: Fate = Fate()) -> None:
        self._fates = iter(fates)
        self._afterwards = afterwards
        self.processes: list[FakeProcess] = []
        self.argvs: list[object] = []
        self.running: set[str] = set()

    def __call__(
        self, name: str, generation: int, argv: object, /, *, on_line: Callable[[str], None], **_more: Any
    ) -> ChildProcess:
        assert name not in self.running, "two processes of one child at a time"
        fate = next(self._fates, self._afterwards)
        if isinstance(fate, Exception):
            raise fate
        self.running.add(name)
        self.argvs.append(argv)
        pid = 101 + len(self.processes)
        process = FakeProcess(name, generation, fate, on_line, lambda: self.running.remove(name), pid)
        self.processes.append(process)
        return process
