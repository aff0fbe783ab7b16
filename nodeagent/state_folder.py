"""The agent's folder on disk, and the lock that keeps it to one agent."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nodeagent.errors import StartupError


@contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """Hold the folder, made if need be, for this process alone; StartupError if it can't be had.

    The lock is flock's: the kernel drops it when the process ends, however it ends.
    """
    lock = state_dir / "lock"
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        file = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StartupError(f"state_dir {state_dir} can't be used: {error.strerror}") from error
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(file, 32).decode(errors="replace").strip() or "unknown"
            raise StartupError(
                f"state_dir {state_dir} is in use by another agent (pid {holder}); give each agent its own"
            ) from None
        os.ftruncate(file, 0)
        os.write(file, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(file)
