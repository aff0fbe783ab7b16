"""HTTP to a server that behaves, and to servers that don't: real sockets and time."""

import socket
import struct

import pytest
import trio
from trio.testing import MockClock

from fakes.raw_server import CHUNKED, PLAIN, answering, ask, body_of, finish, read_request, serving
from nodeagent.errors import UpstreamLost
from nodeagent.llama_server.headers import forwardable
from nodeagent.llama_server.relay import Upstream, is_loading_answer


async def test_the_request_has_the_childs_key_and_its_body_verbatim(nursery: trio.Nursery) -> None:
    seen: list[bytes] = []
    upstream = await serving(nursery, answering(PLAIN, seen=seen))
    with trio.fail_after(5):
        await body_of(await ask(upstream, b'{"odd":  1}'))
    head, _, body = seen[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /v1/chat/completions HTTP/1.1\r\n")
    assert b"authorization: Bearer key" in head
    assert body == b'{"odd":  1}'
    finish(nursery)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
async def test_responses_are_the_same_however_they_are_cut(size: int, nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        plain = await ask(await serving(nursery, answering(PLAIN, size=size)))
        assert (plain.status, plain.event_stream) == (200, False)
        assert plain.headers == [(b"content-type", b"application/json"), (b"content-length", b"11")]
        assert await body_of(plain) == b"hello world"
        events = await ask(await serving(nursery, answering(CHUNKED, size=size)))
        assert events.headers == [(b"content-type", b"text/event-stream")]
        assert events.event_stream
        chunks = []
        while (chunk := await events.next_chunk()) is not None:
            chunks.append(chunk)
        assert b"".join(chunks) == b"data: a\n\ndata: b\n\n"
        assert all(chunk.endswith(b"\n\n") for chunk in chunks)
    finish(nursery)


@pytest.mark.parametrize("answer", [PLAIN, CHUNKED], ids=["plain", "chunked"])
async def test_a_response_that_breaks_anywhere_is_lost_and_never_ends_cleanly(
    answer: bytes, nursery: trio.Nursery
) -> None:
    with trio.fail_after(30):
        for length in range(len(answer)):

            async def cut(stream: trio.SocketStream, length: int = length) -> None:
                await read_request(stream)
                await stream.send_all(answer[:length])

            upstream = await serving(nursery, cut)
            with pytest.raises(UpstreamLost):
                await body_of(await ask(upstream))
    finish(nursery)


async def test_a_connection_is_used_again_after_a_complete_response_and_closed_after_half_of_one(
    nursery: trio.Nursery,
) -> None:
    opened = trio.Event()
    connections: list[trio.SocketStream] = []
    half_closed = trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        connections.append(stream)
        for _ in range(2):
            await read_request(stream)
            await stream.send_all(PLAIN)
        await read_request(stream)
        await stream.send_all(PLAIN[:-3])
        opened.set()
        assert await stream.receive_some(1) == b""
        half_closed.set()

    upstream = await serving(nursery, handler)
    with trio.fail_after(5):
        for _ in range(2):
            await body_of(await ask(upstream))
        answer = await ask(upstream)
        await opened.wait()
        answer.close()
        answer.close()
        await half_closed.wait()
        assert len(connections) == 1
    finish(nursery)


async def test_an_idle_connection_that_the_server_closed_is_replaced_silently(nursery: trio.Nursery) -> None:
    requests = 0

    async def one_each(stream: trio.SocketStream) -> None:
        nonlocal requests
        await read_request(stream)
        requests += 1
        await stream.send_all(PLAIN)

    upstream = await serving(nursery, one_each)
    with trio.fail_after(5):
        for _ in range(3):
            assert await body_of(await ask(upstream)) == b"hello world"
            await trio.sleep(0.05)  # for the server's close to arrive
    assert requests == 3
    finish(nursery)


async def test_a_server_that_refuses_the_connection_is_lost() -> None:
    with trio.socket.socket() as sock:
        await sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    with trio.fail_after(5), pytest.raises(UpstreamLost, match="connection failed"):
        await ask(Upstream(f"127.0.0.1:{port}", "key"))


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * 70_000,
        b"\x00" * 100,
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\nabc",
    ],
    ids=["another protocol", "endless head", "zeros", "a switch of protocols"],
)
async def test_what_is_no_http_response_is_lost(answer: bytes, nursery: trio.Nursery) -> None:
    upstream = await serving(nursery, answering(answer))
    with trio.fail_after(5), pytest.raises(UpstreamLost):
        await body_of(await ask(upstream))
    finish(nursery)


async def test_an_early_refusal_of_a_long_body_is_read_and_its_connection_not_used_again(
    nursery: trio.Nursery,
) -> None:
    connections = 0

    async def refuse(stream: trio.SocketStream) -> None:
        nonlocal connections
        connections += 1
        await stream.receive_some(1000)
        await stream.send_all(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await trio.sleep(1)

    upstream = await serving(nursery, refuse)
    with trio.fail_after(5):
        for _ in range(2):
            answer = await ask(upstream, bytes(20 * 2**20))
            assert answer.status == 413
            assert await body_of(answer) == b"no"
    assert connections == 2
    finish(nursery)


@pytest.mark.parametrize("size", [2, 20 * 2**20], ids=["short", "long"])
async def test_a_wait_for_a_response_that_was_cancelled_goes_on_where_it_was(size: int, nursery: trio.Nursery) -> None:
    read = trio.Event()
    requests: list[bytes] = []

    async def slow(stream: trio.SocketStream) -> None:
        await read.wait()
        requests.append(await read_request(stream))
        for byte in PLAIN:
            await stream.send_all(bytes([byte]))
            await trio.sleep(0.001)

    upstream = await serving(nursery, slow)
    sent = upstream.request("POST", "/", [], b"x" * size)
    waits, response = 0, None
    with trio.fail_after(30):
        while response is None:
            waits += 1
            if waits == 3:
                read.set()
            with trio.move_on_after(0.01):
                response = await sent.response()
            assert upstream.in_flight == 1
        assert await body_of(response) == b"hello world"
    assert waits > 3
    assert [request.partition(b"\r\n\r\n")[2] for request in requests] == [b"x" * size]
    assert upstream.in_flight == 0
    finish(nursery)


async def test_an_interim_response_is_skipped(nursery: trio.Nursery) -> None:
    upstream = await serving(nursery, answering(b"HTTP/1.1 100 Continue\r\n\r\n" + PLAIN))
    with trio.fail_after(5):
        answer = await ask(upstream)
        assert answer.status == 200
        assert await body_of(answer) == b"hello world"
    finish(nursery)


async def test_chunks_that_pile_up_are_returned_as_one(nursery: trio.Nursery) -> None:
    piled = trio.Event()

    async def pile(stream: trio.SocketStream) -> None:
        await read_request(stream)
        head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
        await stream.send_all(head + b"9\r\ndata: a\n\n\r\n")
        for _ in range(100):
            await stream.send_all(b"9\r\ndata: b\n\n\r\n")
        piled.set()
        await trio.sleep_forever()

    with trio.fail_after(5):
        answer = await ask(await serving(nursery, pile))
        await piled.wait()
        received, reads = b"", 0
        while len(received) < 9 * 101:
            chunk = await answer.next_chunk()
            assert chunk is not None
            received += chunk
            reads += 1
        assert reads <= 3
        answer.close()
    finish(nursery)


async def test_cancelling_closes_the_connection_so_that_the_server_sees_it(nursery: trio.Nursery) -> None:
    seen = trio.Event()

    async def silent(stream: trio.SocketStream) -> None:
        await read_request(stream)
        assert await stream.receive_some(1) == b""
        seen.set()

    upstream = await serving(nursery, silent)
    with trio.fail_after(5):
        with trio.move_on_after(0.1) as scope:
            await ask(upstream)
        assert scope.cancelled_caught
        await seen.wait()
    finish(nursery)


@pytest.mark.parametrize("on_idle_connection", [False, True])
async def test_a_request_that_another_task_gives_up_is_lost_at_once_and_not_sent_again(
    on_idle_connection: bool, nursery: trio.Nursery
) -> None:
    arrived, left, count = trio.Event(), trio.Event(), 0

    async def handler(stream: trio.SocketStream) -> None:
        nonlocal count
        if on_idle_connection and not count:
            count += 1
            await read_request(stream)
            await stream.send_all(PLAIN)
        count += 1
        await read_request(stream)
        arrived.set()
        assert await stream.receive_some(1) == b""
        left.set()

    upstream = await serving(nursery, handler)
    with trio.fail_after(5):
        if on_idle_connection:
            await body_of(await ask(upstream))
        sent = upstream.request("POST", "/v1/completions", [], b"{}")

        async def give_up() -> None:
            await arrived.wait()
            sent.close()

        nursery.start_soon(give_up)
        with pytest.raises(UpstreamLost):
            await sent.response()
        await left.wait()
        with pytest.raises(UpstreamLost, match="given up"):
            await sent.response()
    assert (count, upstream.in_flight) == (1 + on_idle_connection, 0)
    finish(nursery)


async def test_a_closed_upstream_keeps_no_connection(nursery: trio.Nursery) -> None:
    ended = trio.Event()

    async def handler(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(PLAIN)
        assert await stream.receive_some(1) == b""
        ended.set()

    upstream = await serving(nursery, handler)
    with trio.fail_after(5):
        await body_of(await ask(upstream))
        upstream.close()
        assert upstream.closed.is_set()
        await ended.wait()
    finish(nursery)


@pytest.mark.parametrize(
    ("status", "body", "loading"),
    [
        (503, b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}', True),
        (503, b'{"error":{"message":"no","type":"server_error","code":503}}', False),
        (503, b"down", False),
        (200, b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}', False),
    ],
)
async def test_llama_servers_response_while_it_loads_is_recognized(
    status: int, body: bytes, loading: bool, nursery: trio.Nursery
) -> None:
    head = b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % (status, len(body))
    with trio.fail_after(5):
        answer = await ask(await serving(nursery, answering(head + body)))
        assert is_loading_answer(answer) is loading
        answer.close()
    finish(nursery)


def test_of_a_clients_headers_only_what_the_child_needs_is_forwarded() -> None:
    others = [(b"authorization", b"Bearer secret"), (b"x-api-key", b"secret"), (b"cookie", b"x"), (b"host", b"h")]
    kept = [(b"content-type", b"application/json"), (b"traceparent", b"00-1-2-01"), (b"tracestate", b"a=b")]
    assert forwardable([*others, *kept]) == kept


async def test_the_repr_of_an_upstream_names_its_address_its_requests_and_its_idle_connections(
    nursery: trio.Nursery,
) -> None:
    upstream = await serving(nursery, answering(PLAIN))
    with trio.fail_after(5):
        assert repr(upstream) == f"<Upstream {upstream.address}: 0 in flight, 0 idle connections>"
        response = await ask(upstream)
        assert repr(upstream) == f"<Upstream {upstream.address}: 1 in flight, 0 idle connections>"
        assert repr(response) == f"<UpstreamResponse 200 from {upstream.address}, open>"
        await body_of(response)
        assert repr(upstream) == f"<Upstream {upstream.address}: 0 in flight, 1 idle connections>"
        assert repr(response) == f"<UpstreamResponse 200 from {upstream.address}, complete>"
        _since, connection = upstream._idle[0]
        assert repr(connection) == f"<Connection to {upstream.address}, open>"
        upstream.close()
        assert repr(upstream) == f"<Upstream {upstream.address}: 0 in flight, 0 idle connections, closed>"
        assert repr(connection) == f"<Connection to {upstream.address}, closed>"
    finish(nursery)


async def test_as_many_connections_are_kept_as_requests_were_in_flight_and_only_while_the_server_keeps_them(
    nursery: trio.Nursery,
) -> None:
    address = (await serving(nursery, answering(PLAIN))).address
    upstream = Upstream(address, "key", idle_max_s=0.2)
    with trio.fail_after(5):
        for _ in range(2):
            responses = [await ask(upstream) for _ in range(10)]
            assert upstream.in_flight == 10
            for response in responses:
                await body_of(response)
            assert repr(upstream) == f"<Upstream {address}: 0 in flight, 10 idle connections>"
        await trio.sleep(0.3)
        await body_of(await ask(upstream))
        assert repr(upstream) == f"<Upstream {address}: 0 in flight, 1 idle connections>"
    upstream.close()
    finish(nursery)


async def test_a_connection_that_was_idle_for_too_long_is_not_used_again(nursery: trio.Nursery) -> None:
    address = (await serving(nursery, answering(PLAIN))).address
    upstream = Upstream(address, "key", idle_max_s=0.0)
    with trio.fail_after(5):
        await body_of(await ask(upstream))
        _since, first = upstream._idle[0]
        await body_of(await ask(upstream))
    assert repr(first) == f"<Connection to {address}, closed>"
    assert repr(upstream) == f"<Upstream {address}: 0 in flight, 1 idle connections>"
    upstream.close()
    finish(nursery)


async def test_a_server_that_closes_every_connection_without_a_byte_is_lost(nursery: trio.Nursery) -> None:
    async def hang_up(stream: trio.SocketStream) -> None:
        await read_request(stream)

    upstream = await serving(nursery, hang_up)
    with trio.fail_after(5), pytest.raises(UpstreamLost, match="closed the connection without a response"):
        await ask(upstream)
    assert upstream.in_flight == 0
    finish(nursery)


async def test_a_server_that_resets_the_connection_in_its_response_is_lost(nursery: trio.Nursery) -> None:
    async def reset(stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(PLAIN[:-3])
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    upstream = await serving(nursery, reset)
    with trio.fail_after(5):
        response = await ask(upstream)
        with pytest.raises(UpstreamLost, match=r"the connection broke|before the response was complete"):
            await body_of(response)
    assert repr(response) == f"<UpstreamResponse 200 from {upstream.address}, closed>"
    finish(nursery)


async def test_a_connect_that_is_cancelled_leaves_nothing_open(autojump_clock: MockClock) -> None:
    upstream = Upstream("127.0.0.1:1", "key")
    with trio.CancelScope() as scope:
        scope.cancel()
        await ask(upstream)
    assert scope.cancelled_caught
    assert upstream.in_flight == 0
