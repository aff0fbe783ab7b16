"""The bytes of one client's connection: its socket, with TLS or without, and how it is closed.

What is put and not taken by the socket at once waits in order, and `flush` sends it within the send timeout.
"""

import os
import socket
import ssl
import struct
from collections import deque
from contextlib import suppress
from typing import Final

import trio

from nodeagent.front.tls import Tls

_RECEIVE_BYTES: Final = 2**16
# A client must read this much within the send timeout, however long the answer is.
SEND_BYTES: Final = 2**16
# How long to read from a client that still sends after its last answer.
_LINGER_S: Final = 2.0
# SO_LINGER with a time of zero: closing discards what is unsent and resets the connection.
_RESET: Final = struct.pack("ii", 1, 0)


class Transport:
    """Reads and writes one connection.

    `unsent_bytes` is what waits for the socket. What changes: that and `_unsent`, in `put` and `flush`; `_early`, in
    `shake_hands` and `receive`; `tls`, in `shake_hands`, if the client speaks plain HTTP.
    """

    def __init__(self, stream: trio.SocketStream, tls: Tls | None, send_timeout_s: float) -> None:
        self.socket = stream.socket
        self.tls = tls
        self.unsent_bytes = 0
        self._stream = stream
        self._send_timeout_s = send_timeout_s
        self._send_lock = trio.Lock()
        self._unsent: deque[memoryview] = deque()
        self._early = b""  # what came with the end of the handshake

    async def shake_hands(self, tls: Tls) -> bool:
        """Begin TLS; return whether that worked. Raises PlainHttp if the client speaks that, and ssl.SSLError after it
        was told what is wrong."""
        done = False
        while not done:
            received = await self._stream.receive_some()
            try:
                done, reply = tls.shake_hands(received)
            except ssl.SSLError as error:
                alert = tls.goodbye()
                if error.reason == "HTTP_REQUEST":
                    self.tls = None
                    raise PlainHttp from None
                await self._stream.send_all(alert)
                raise
            if not received:
                return False
            await self._stream.send_all(reply)
        self._early = tls.decode(b"")
        return True

    async def receive(self) -> bytes | None:
        """What the client has sent, b"" at the end of its input, None if the connection is broken."""
        if self._early:
            data, self._early = self._early, b""
            return data
        tls = self.tls
        while True:
            if tls is not None and tls.ended:
                return b""
            descriptor = self.socket.fileno()
            if descriptor == -1:  # an incomplete write has just closed it
                return None
            try:
                await trio.lowlevel.wait_readable(descriptor)
                data = os.read(self.socket.fileno(), _RECEIVE_BYTES)
                if tls is None or not data:
                    return data
                if data := tls.decode(data):
                    return data
            except BlockingIOError:
                continue
            except (OSError, trio.ClosedResourceError):
                return None

    def put(self, data: bytes) -> None:
        """Write what the socket takes at once, and keep the rest for `flush`. Raises OSError if the client has left."""
        if self.tls is not None:
            data = self.tls.encode(data)
        written = 0
        if not self._unsent:
            try:
                written = os.write(self.socket.fileno(), data)
            except BlockingIOError:
                written = 0
        if written < len(data):
            self._unsent.append(memoryview(data)[written:])
            self.unsent_bytes += len(data) - written

    async def flush(self) -> None:
        """Send what waits. Raises trio.TooSlowError if the client reads too little, OSError and trio's errors of a
        resource if it has left. After that, or if it is cancelled, nothing may follow: reset the connection."""
        async with self._send_lock:
            while self._unsent:
                piece = self._unsent[0]
                for start in range(0, len(piece), SEND_BYTES):
                    part = piece[start : start + SEND_BYTES]
                    with trio.fail_after(self._send_timeout_s):
                        await self._stream.send_all(part)
                    self.unsent_bytes -= len(part)
                self._unsent.popleft()

    # The end.

    async def linger(self) -> None:
        """Read on while the client sends: to close with unread bytes is a reset, and that can overtake the answer."""
        with trio.move_on_after(_LINGER_S), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            self._say_goodbye()
            async with self._send_lock:
                await self._stream.send_eof()
            while await self.receive():
                continue

    def close(self) -> None:
        """Close it so that the client knows that nothing follows."""
        self._say_goodbye()
        self.socket.close()

    def reset(self) -> None:
        """Close it so that the client can't mistake a truncated answer for a complete one."""
        # The socket may be closed already. On macOS, one that the client has reset rejects the option.
        with suppress(OSError):
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.socket.close()

    def _say_goodbye(self) -> None:
        """Tell a client of TLS that the answer ends as it should; without that, it may take it for truncated."""
        if self.tls is not None and self.socket.fileno() != -1 and not self._unsent:
            with suppress(OSError):
                os.write(self.socket.fileno(), self.tls.goodbye())


class PlainHttp(Exception):
    """The client of an address with TLS speaks plain HTTP."""
