"""What the agent itself asks a child (requests of clients go through `relay`): one bounded exchange for each question.

Whatever the child sends, or does not, ends in a Reply or a ControlError by the deadline, within the bound on bytes.
"""

import json
import socket
from collections.abc import Mapping
from typing import Final, TypeVar

import httptools
import msgspec
import trio

from supervisor.output import printable

_READ_BYTES: Final = 64 * 1024
# All that comes before the head of the answer ends, interim responses (1xx) included; llama-server sends 300 bytes.
_HEAD_MAX_BYTES: Final = 64 * 1024
# How much of an answer an error message shows.
_SHOWN_BYTES: Final = 200
# The second is no kind of the first: what an answer that switches to another protocol raises.
_INVALID: Final = (httptools.HttpParserError, httptools.HttpParserUpgrade)

T = TypeVar("T")


class ControlError(Exception):
    """The child gave no answer that can be used; the message says why, for people, and quotes nothing of the answer.

    If the agent itself lacked something, a cause of this error says so (`supervisor.containment.own_shortage`).
    """


class Reply(msgspec.Struct, frozen=True):
    """A whole answer."""

    status: int
    body: bytes

    def shown(self) -> str:
        """Its status and the beginning of its body on one line, for operators."""
        return printable(f"{self.status} {self.body[:_SHOWN_BYTES].decode(errors='replace')}")

    def read_as(self, kind: type[T]) -> T:
        """The body as JSON of this type; fields that the type doesn't have are checked, and not built.

        Raises ControlError for anything else, also for what is nested too deeply or out of the range of numbers.
        """
        try:
            return msgspec.json.decode(self.body, type=kind)
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError) as error:
            raise ControlError(f"unexpected JSON: {printable(str(error))}") from error


async def ask(
    address: str,
    api_key: str,
    path: str,
    *,
    timeout_s: float,
    max_bytes: int,
    method: str = "GET",
    body: Mapping[str, object] | None = None,
) -> Reply:
    """Ask the child at this address (IP:port), on a connection of its own, with its key; `body` is sent as JSON.

    `timeout_s` is for the whole exchange, `max_bytes` for all that is received: heads, body, chunk sizes, trailers.
    Raises ControlError. Cancelling closes the connection.
    """
    try:
        with trio.fail_after(timeout_s):
            return await _exchange(address, _request(address, api_key, method, path, body), max_bytes)
    except trio.TooSlowError:
        raise ControlError(f"no complete answer within {timeout_s:g} s") from None
    except (OSError, trio.BrokenResourceError) as error:
        raise ControlError(f"the connection failed: {error.__cause__ or error}") from error
    except _INVALID as error:
        raise ControlError(f"sent invalid HTTP: {printable(str(error))}") from error


def _request(address: str, api_key: str, method: str, path: str, body: Mapping[str, object] | None) -> bytes:
    content = b"" if body is None else json.dumps(body).encode("ascii")
    lines = [
        f"{method} {path} HTTP/1.1",
        f"host: {address}",
        f"authorization: Bearer {api_key}",
        "accept: application/json",
        "content-type: application/json",
        f"content-length: {len(content)}",
        "connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode("ascii") + content


async def _exchange(address: str, request: bytes, max_bytes: int) -> Reply:
    ip, _, port = address.rpartition(":")
    sock = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    with sock:
        await sock.connect((ip, int(port)))
        stream = trio.SocketStream(sock)
        await stream.send_all(request)
        answer = _Answer(max_bytes)
        while not answer.complete:
            answer.feed(await stream.receive_some(_READ_BYTES))
        return Reply(answer.status, bytes(answer.body))


class _Answer:
    """Parses an answer. What changes: everything, in `feed`, through the methods that httptools calls."""

    def __init__(self, max_bytes: int) -> None:
        self.status = 0
        self.body = bytearray()
        self.complete = False
        self._max_bytes = max_bytes
        self._received = 0
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        """Take what was received; b"" is the end of the connection. What follows a complete answer is dropped."""
        if not data:
            raise ControlError("closed the connection before its answer was complete")
        self._received += len(data)
        if self._received > self._max_bytes:
            raise ControlError(f"sent more than {self._max_bytes} bytes")
        try:
            self._parser.feed_data(data)
        except _INVALID:
            if not self.complete:
                raise
        if not self.status and self._received > _HEAD_MAX_BYTES:
            raise ControlError(f"sent more than {_HEAD_MAX_BYTES} bytes before its answer")

    # What httptools calls.

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200 and not self.complete:  # after 100 Continue and the like another head follows
            self.status = status

    def on_body(self, body: bytes) -> None:
        if not self.complete:
            self.body += body

    def on_message_complete(self) -> None:
        self.complete = self.complete or self.status != 0
