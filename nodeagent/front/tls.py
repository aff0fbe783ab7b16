"""TLS on one connection: bytes in, bytes out. `transport.py` reads and writes the socket."""

import ssl
from collections.abc import Callable
from typing import Final

FindContext = Callable[[], ssl.SSLContext | None]
"""The context for new connections, None for those without TLS."""

_RECORD_BYTES: Final = 2**16


def no_tls() -> ssl.SSLContext | None:
    """Connections are plain."""
    return None


class Tls:
    """The server's side of TLS. What changes: `ended`, whether the client has closed its side, in `decode`."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self._object = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._needs_certificate = context.verify_mode is not ssl.CERT_NONE
        self.ended = False

    def shake_hands(self, received: bytes) -> tuple[bool, bytes]:
        """Take what the client has sent; return whether that completes the handshake, and what to send.

        Raises ssl.SSLError; what `goodbye` returns tells the client why.
        """
        self._incoming.write(received)
        try:
            self._object.do_handshake()
        except ssl.SSLWantReadError:
            return False, self._outgoing.read()
        return True, self._outgoing.read()

    @property
    def speaks_http2(self) -> bool:
        """Whether the client has agreed on HTTP/2 (by ALPN), once hands are shaken."""
        return self._object.selected_alpn_protocol() == "h2"

    @property
    def lacks_certificate(self) -> bool:
        """Whether the client has shown no certificate although clients should. A wrong one fails the handshake."""
        return self._needs_certificate and self._object.getpeercert(binary_form=True) is None

    def decode(self, received: bytes) -> bytes:
        """What the client has sent with these bytes, b"" if they are a part of a record. Raises ssl.SSLError."""
        self._incoming.write(received)
        pieces = []
        try:
            while piece := self._object.read(_RECORD_BYTES):
                pieces.append(piece)
            self.ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.ended = True
        return b"".join(pieces)

    def encode(self, data: bytes) -> bytes:
        """What to send for these bytes. Raises ssl.SSLError."""
        self._object.write(data)
        return self._outgoing.read()

    def goodbye(self) -> bytes:
        """What tells the client that nothing follows; after a failed handshake, why."""
        try:
            self._object.unwrap()
        except (ssl.SSLError, ValueError):  # it waits for the client's own, which nobody reads
            return self._outgoing.read()
        return self._outgoing.read()
