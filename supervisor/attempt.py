"""One attempt of a child to become ready, for those who wait for it."""

import trio

from supervisor.errors import SupervisorError
from supervisor.lifecycle import Ready


class StartAttempt:
    """One attempt to become ready, and its outcome for the callers that wait for it."""

    def __init__(self) -> None:
        self._over = trio.Event()
        self._ready: Ready | None = None
        self._error: SupervisorError | None = None

    def succeed(self, ready: Ready) -> None:
        self._ready = ready
        self._over.set()

    def fail(self, error: SupervisorError) -> None:
        """Record the failure, unless the attempt succeeded before."""
        if not self._over.is_set():
            self._error = error
            self._over.set()

    async def outcome(self) -> Ready:
        """Wait for the outcome; return the Ready event or raise the error."""
        await self._over.wait()
        if self._error is not None:
            raise self._error
        assert self._ready is not None
        return self._ready
