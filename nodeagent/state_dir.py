"""The agent's folder on disk: the lock that allows one agent only, the admin token, the address of the agent."""

import errno
import fcntl
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from nodeagent.errors import StartupError
from nodeagent.whole_files import replace_file

logger = logging.getLogger(__name__)

# flock(2) and, as some network file systems have it, fcntl(2).
_LOCKED_BY_ANOTHER = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


@contextmanager
def locked(state_dir: Path) -> Iterator[None]:
    """Create the folder if necessary, and lock it for this process. Raises StartupError.

    The lock is a flock(2): the kernel drops it when the process ends, however it ends.
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
        except OSError as error:
            if error.errno not in _LOCKED_BY_ANOTHER:
                raise StartupError(
                    f"state_dir {state_dir} can't be locked: {error.strerror}; its file system has to support flock(2)"
                ) from error
            holder = os.read(file, 32).decode(errors="replace").strip() or "unknown"
            raise StartupError(
                f"state_dir {state_dir} is in use by another agent (pid {holder}); give each agent its own"
            ) from None
        with suppress(OSError):  # on a full disk; the pid is only for the error message of another agent
            os.ftruncate(file, 0)
            os.write(file, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(file)


def children_file(state_dir: Path) -> Path:
    """The file in which the running children are recorded."""
    return state_dir / "children.json"


def loads_file(state_dir: Path) -> Path:
    """The file of what loads took."""
    return state_dir / "loads.json"


def kv_folder(state_dir: Path) -> Path:
    """The folder for the KV caches of models that are not loaded now (`keep_kv`)."""
    return state_dir / "kv"


def admin_token(state_dir: Path) -> str:
    """The admin token, created on first use; only the agent's own user can read it.

    Raises StartupError if it can't be created or read.
    """
    path = state_dir / "admin.token"
    try:
        if not path.exists():
            replace_file(path, f"{secrets.token_urlsafe(32)}\n".encode(), private=True)
        token = path.read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise StartupError(f"{path} can't be used: {error}") from error
    if not token:
        raise StartupError(f"{path} is empty; remove it to get a new token")
    return token


def write_address(state_dir: Path, base_url: str) -> None:
    """Record the agent's address for the command line. If that fails (on a full disk), log a warning."""
    path = state_dir / "address"
    try:
        replace_file(path, f"{base_url}\n".encode("ascii"))
    except OSError as error:
        logger.warning("%s can't be written, so commands may not find this agent: %s", path, error.strerror)


def certificate_file(state_dir: Path) -> Path:
    """A copy of the certificate that the agent shows, by which the command line knows it."""
    return state_dir / "certificate.pem"


def write_certificate(state_dir: Path, certificate: Path | None) -> None:
    """Copy the agent's certificate, or remove the copy. If that fails, log a warning."""
    copy = certificate_file(state_dir)
    try:
        if certificate is None:
            copy.unlink(missing_ok=True)
        else:
            replace_file(copy, certificate.read_bytes())
    except OSError as error:
        logger.warning("%s can't be written, so commands may not trust this agent: %s", copy, error.strerror)


def read_address(state_dir: Path) -> str:
    """The address of this folder's agent. Raises StartupError if no agent has run with it."""
    try:
        return (state_dir / "address").read_text(encoding="ascii").strip()
    except (OSError, ValueError) as error:
        raise StartupError(f"no agent has run with state_dir {state_dir}: {error}") from error
