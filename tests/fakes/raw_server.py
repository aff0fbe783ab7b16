"""Servers that send exactly the bytes that a test wants, and requests to them through an Upstream."""

from collections.abc import Awaitable, Callable
from functools import partial

import trio

from nodeagent.llama_server.relay import Upstream, UpstreamResponse

Handler = Callable[[trio.SocketStream], Awaitable[None]]

PLAIN = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nServer: llama.cpp\r\nContent-Length: 11\r\n\r\nhello world"
)
CHUNKED = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\nKeep-Alive: timeout=5\r\n"
    b"Access-Control-Allow-Origin: *\r\n\r\n9\r\ndata: a\n\n\r\n4\r\ndata\r\n5\r\n: b\n\n\r\n0\r\n\r\n"
)


OPEN: list[Upstream] = []


def finish(nursery: trio.Nursery) -> None:
    """Close what the test opened, and end its servers."""
    while OPEN:
        OPEN.pop().close()
    nursery.cancel_scope.cancel()


async def serving(nursery: trio.Nursery, handler: Handler) -> Upstream:
    async def handle(stream: trio.SocketStream) -> None:
        try:
            async with stream:
                await handler(stream)
        except trio.BrokenResourceError:
            return  # the client closed first, as some tests want

    listeners = await nursery.start(partial(trio.serve_tcp, handle, 0, host="127.0.0.1"))
    host, port = listeners[0].socket.getsockname()
    OPEN.append(Upstream(f"{host}:{port}", "key"))
    return OPEN[-1]


async def read_request(stream: trio.SocketStream) -> bytes:
    received = b""
    while b"\r\n\r\n" not in received:
        data = await stream.receive_some(65536)
        if not data:
            return b""
        received += data
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
    while len(body) < length:
        body += await stream.receive_some(65536)
    return head + b"\r\n\r\n" + body


async def ask(upstream: Upstream, body: bytes = b"{}") -> UpstreamResponse:
    sent = upstream.request("POST", "/v1/chat/completions", [(b"content-type", b"application/json")], body)
    try:
        return await sent.response()
    except BaseException:
        sent.close()
        raise


async def body_of(answer: UpstreamResponse) -> bytes:
    body = b""
    try:
        while (chunk := await answer.next_chunk()) is not None:
            body += chunk
    finally:
        answer.close()
    return body


def answering(answer: bytes, *, size: int | None = None, seen: list[bytes] | None = None) -> Handler:
    """Respond to every request with these bytes, in pieces of that size."""

    async def handler(stream: trio.SocketStream) -> None:
        while request := await read_request(stream):
            if seen is not None:
                seen.append(request)
            for place in range(0, len(answer), size or len(answer)):
                await stream.send_all(answer[place : place + (size or len(answer))])
                if size is not None:
                    await trio.sleep(0.0005)

    return handler
