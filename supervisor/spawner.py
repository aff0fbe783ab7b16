"""What the supervisor needs of a process, and of whatever starts one.

`supervisor.spawn` implements both with real processes; the tests implement them with fake ones in virtual time.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import trio

from supervisor.probe import ProcessView


class ChildProcess(ProcessView, Protocol):
    """A process that was started; its methods behave as those of `supervisor.spawn.Process`."""

    @property
    def returncode(self) -> int | None: ...

    @property
    def ended(self) -> trio.Event: ...

    async def attend(self) -> None: ...

    async def terminate(self, grace_s: float) -> None: ...

    def kill(self) -> None: ...

    def reap_strays(self, others: Collection[int]) -> None: ...

    def out_of_memory(self) -> str | None: ...


class Spawner(Protocol):
    """Starts a process, as `supervisor.spawn.spawn` does. Raises OSError or ValueError if it can't."""

    def __call__(
        self,
        name: str,
        generation: int,
        argv: Sequence[str],
        /,
        *,
        env: Mapping[str, str],
        cwd: Path | None,
        cpus: frozenset[int] | None,
        on_line: Callable[[str], None],
    ) -> ChildProcess: ...
