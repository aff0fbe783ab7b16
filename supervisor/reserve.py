"""A reserve of file descriptors, so that spawns and probes work although something else has used up all others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from supervisor.containment import own_shortage
from supervisor.errors import ProbeUnavailable
from supervisor.probe import Probe, ProcessView

# A spawn needs six for a moment (a pipe for the output, a null device, a pipe by which `subprocess` learns of a failed
# exec, and one that looks at /proc), and keeps two (the pipe's end and the pidfd). A probe needs two or three.
DESCRIPTORS = 12


class DescriptorReserve:
    """Descriptors of /dev/null, which are closed for what needs them and opened again afterwards.

    What is closed for a moment without a checkpoint, no other task can take. What is closed while a probe runs, another
    task can, in principle. A child that runs keeps two of those released for its spawn, while there are no others; they
    come back when there are.

    What changes: `_held`, `_open` and `_released`, in every method.
    """

    def __init__(self, size: int = DESCRIPTORS) -> None:
        self._size = size
        self._held: list[int] = []
        self._open = False
        self._released = 0

    def fill(self) -> None:
        """Take what is missing, as far as there is any."""
        self._open = True
        try:
            while len(self._held) < self._size:
                self._held.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
        except OSError:
            return  # there are no more

    def close(self) -> None:
        """Give everything back, for good."""
        self._open = False
        self._give_back()

    @contextmanager
    def released(self) -> Iterator[None]:
        """Within it the reserve is free for others."""
        self._give_back()
        self._released += 1
        try:
            yield
        finally:
            self._released -= 1
            if self._open and not self._released:
                self.fill()

    def _give_back(self) -> None:
        while self._held:
            os.close(self._held.pop())


class ProbeWithReserve:
    """A probe that is repeated with the reserve if it failed for want of a file descriptor."""

    def __init__(self, probe: Probe, reserve: DescriptorReserve) -> None:
        self._probe = probe
        self._reserve = reserve

    async def check(self, process: ProcessView) -> str:
        try:
            return await self._probe.check(process)
        except Exception as error:
            if not isinstance(error, ProbeUnavailable) and own_shortage(error) is None:
                raise
        with self._reserve.released():
            return await self._probe.check(process)
