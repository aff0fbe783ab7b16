"""What the agent tells the program that runs it as a service, by systemd's protocol (sd_notify(3)).

Each message is one datagram of lines `NAME=value` to the socket that $NOTIFY_SOCKET names. Without that variable, all
of this does nothing.
"""

import logging
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Final

logger = logging.getLogger(__name__)

_VARIABLES: Final = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
# Messages that the service manager has not taken yet. One takes them within milliseconds.
_UNSENT_MAX: Final = 64
_STATUS_MAX_CHARS: Final = 500


class ServiceManager:
    """The service manager, if there is one. No method waits or raises.

    `watchdog_s` is how often it wants to be told that the agent is well, None if it doesn't. What changes: `_unsent`
    (what did not fit into the socket's queue), in `_notify` and `flush`; `_is_up` in `ready` and
    `stopping`; `_status`, the last one told, in `status`; `_complained`, in `_complain`.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        """Take the variables out of the environment: they are not for the servers."""
        given = {name: environ.pop(name, "") for name in _VARIABLES}
        self._address = _address(given["NOTIFY_SOCKET"])
        self._socket = None if self._address is None else _socket()
        for_us = given["WATCHDOG_PID"] in ("", str(os.getpid()))
        usec = given["WATCHDOG_USEC"]
        self.watchdog_s = int(usec) / 1e6 if self._socket and for_us and usec.isdecimal() and int(usec) else None
        self._unsent: deque[bytes] = deque(maxlen=_UNSENT_MAX)
        self._is_up = False
        self._status = ""
        self._complained = False

    def ready(self) -> None:
        """The agent accepts requests."""
        self._is_up = True
        self._notify("READY=1")

    @contextmanager
    def reloading(self) -> Iterator[None]:
        """The configuration is read again, until the end of this. Only an agent that is up says so."""
        if self._is_up:
            self._notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            yield
        finally:
            if self._is_up:
                self._notify("READY=1")

    def stopping(self) -> None:
        """The agent has begun to stop."""
        self._is_up = False
        self._notify("STOPPING=1")

    def extend(self, by_s: float) -> None:
        """The agent still stops: give it that much time from now on, whatever the time-out."""
        self._notify(f"EXTEND_TIMEOUT_USEC={int(by_s * 1e6)}")

    def feed_watchdog(self) -> None:
        """The agent is well."""
        self._notify("WATCHDOG=1")

    def status(self, text: str) -> None:
        """Show this line in `systemctl status`."""
        if text != self._status:
            self._status = text
            self._notify(f"STATUS={' '.join(text.split())[:_STATUS_MAX_CHARS]}")

    def flush(self) -> None:
        """Send what could not be sent before, in order."""
        if self._socket is None or self._address is None:
            return
        try:
            while self._unsent:
                self._socket.sendto(self._unsent[0], self._address)
                self._unsent.popleft()
        except BlockingIOError:  # its queue is full
            return
        except OSError as error:
            self._unsent.clear()
            self._complain(error)

    def close(self) -> None:
        """Close the socket; later messages go nowhere."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _notify(self, *lines: str) -> None:
        if self._socket is not None:
            self._unsent.append("\n".join(lines).encode())
            self.flush()

    def _complain(self, error: OSError) -> None:
        if not self._complained:
            self._complained = True
            logger.warning("can't tell the service manager at NOTIFY_SOCKET how the agent is: %s", error)


def _address(given: str) -> str | bytes | None:
    """The address of a Unix socket: a path, or with @ an abstract name."""
    if given.startswith("@"):
        return b"\0" + os.fsencode(given[1:])
    if given.startswith("/"):
        return given
    if given:
        logger.warning("NOTIFY_SOCKET must be a path or begin with @, found %r: nobody is told how the agent is", given)
    return None


def _socket() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | getattr(socket, "SOCK_CLOEXEC", 0))
    sock.setblocking(False)
    return sock
