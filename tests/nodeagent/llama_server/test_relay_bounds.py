"""What a server may send is bounded: nothing of it grows without end, and nothing gets into another's response."""

import pytest
import trio

from fakes.raw_server import CHUNKED, PLAIN, Handler, answering, ask, body_of, finish, read_request, serving
from nodeagent.errors import UpstreamLost

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
PIECE_BYTES = 2**16


class Flood:
    """Responds with `begin`, then with `piece` until the connection is closed; `sent_bytes` counts those."""

    def __init__(self, begin: bytes, piece: bytes) -> None:
        self.sent_bytes = 0
        self.closed = trio.Event()
        self._begin = begin
        self._piece = piece

    async def __call__(self, stream: trio.SocketStream) -> None:
        await read_request(stream)
        try:
            await stream.send_all(self._begin)
            while True:
                await stream.send_all(self._piece)
                self.sent_bytes += len(self._piece)
        finally:
            self.closed.set()


@pytest.mark.parametrize(
    ("begin", "piece", "most_mib"),
    [
        (b"HTTP/1.1 200 OK\r\nX: ", b"y" * PIECE_BYTES, 1),
        (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n" * 10_000, 1),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 2_000, 1),
        (STREAM + b"9\r\ndata: a\n\n\r\n0\r\nX: ", b"y" * PIECE_BYTES, 1),
        (STREAM + b"9\r\ndata: a\n\n\r\n0\r\n", b"X: y\r\n" * 10_000, 1),
        (STREAM + b"9;x=", b"y" * PIECE_BYTES, 1),
        (STREAM + b"9\r\ndata: a\n\n\r\n6\r\ndata: \r\n", b"10000\r\n" + b"y" * PIECE_BYTES + b"\r\n", 17),
    ],
    ids=["one header", "headers", "interim responses", "one trailer", "trailers", "chunk extension", "one event"],
)
async def test_a_response_without_end_is_lost_soon(
    begin: bytes, piece: bytes, most_mib: int, nursery: trio.Nursery
) -> None:
    flood = Flood(begin, piece)
    upstream = await serving(nursery, flood)
    with trio.fail_after(10):
        with pytest.raises(UpstreamLost, match=r"sent (more than|an event of more than) \d+ bytes"):
            await body_of(await ask(upstream))
        await flood.closed.wait()
    socket_buffers_mib = 8
    assert flood.sent_bytes < (most_mib + socket_buffers_mib) * 2**20
    assert upstream.in_flight == 0
    finish(nursery)


def surplus_after(delay_s: float) -> Handler:
    """Responds properly to each request, and sends another response that nobody asked for after that time."""
    stolen = b"HTTP/1.1 200 OK\r\nContent-Length: 6\r\n\r\nstolen"

    async def handler(stream: trio.SocketStream) -> None:
        while await read_request(stream):
            if not delay_s:
                await stream.send_all(PLAIN + stolen)
            else:
                await stream.send_all(PLAIN)
                await trio.sleep(delay_s)
                await stream.send_all(stolen)

    return handler


@pytest.mark.parametrize("delay_s", [0.0, 0.05], ids=["with it", "later"])
async def test_what_follows_a_response_is_never_taken_for_the_next_one(delay_s: float, nursery: trio.Nursery) -> None:
    upstream = await serving(nursery, surplus_after(delay_s))
    with trio.fail_after(5):
        for _ in range(3):
            assert await body_of(await ask(upstream)) == b"hello world"
            await trio.sleep(2 * delay_s)
    finish(nursery)


@pytest.mark.parametrize("surplus", [b"garbage", b"\0", b"HTTP/1.1 200 OK\r\n"])
async def test_a_connection_with_bytes_after_its_response_is_not_kept(surplus: bytes, nursery: trio.Nursery) -> None:
    upstream = await serving(nursery, answering(PLAIN + surplus))
    with trio.fail_after(5):
        assert await body_of(await ask(upstream)) == b"hello world"
    assert "0 idle connections" in repr(upstream)
    finish(nursery)


async def test_trailers_are_dropped(nursery: trio.Nursery) -> None:
    upstream = await serving(nursery, answering(CHUNKED.replace(b"0\r\n\r\n", b"0\r\nX-Late: y\r\n\r\n")))
    with trio.fail_after(5):
        response = await ask(upstream)
        await body_of(response)
    assert b"x-late" not in dict(response.headers)
    assert "1 idle connections" in repr(upstream)
    finish(nursery)
