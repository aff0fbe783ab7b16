"""A server for control requests: it reads each request, and sends what a function returns for it."""

from collections.abc import Callable
from functools import partial

import trio

Respond = Callable[[str, str], bytes | None]
"""From the request line and the body to the whole response; None leaves the request without one."""


def response(body: str, *, status: int = 200) -> bytes:
    """A whole response, with its length."""
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()


async def start_http_stub(nursery: trio.Nursery, respond: Respond) -> str:
    """Serve in the nursery; return the address, IP:port."""

    async def handle(stream: trio.SocketStream) -> None:
        async with stream:
            request_line, body = await _read(stream)
            reply = respond(request_line, body)
            if reply is None:
                await trio.sleep_forever()
            else:
                await stream.send_all(reply)

    listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
    host, port = listeners[0].socket.getsockname()
    return f"{host}:{port}"


async def _read(stream: trio.SocketStream) -> tuple[str, str]:
    received = b""
    while b"\r\n\r\n" not in received:
        received += await _some(stream)
    head, _, body = received.partition(b"\r\n\r\n")
    lengths = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    length = int(lengths[0].partition(b":")[2]) if lengths else 0
    while len(body) < length:
        body += await _some(stream)
    return head.partition(b"\r\n")[0].decode(), body.decode()


async def _some(stream: trio.SocketStream) -> bytes:
    data = await stream.receive_some(65536)
    assert data, "the request was cut off"
    return data
