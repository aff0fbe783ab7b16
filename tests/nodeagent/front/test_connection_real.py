"""What one client can do to its connection, by real sockets: slow, gone, silent, pipelining."""

import logging
import socket
import struct
from typing import Any

import pytest
import trio
from trio.testing import open_stream_to_socket_listener, wait_all_tasks_blocked

from fakes.asgi import Held, Receive, Send, Torrent, hello
from fakes.serving import GET, GET_AND_CLOSE, Peer, assert_serves, quart_app, start_serving
from nodeagent.front.connection import Connection, Shared
from nodeagent.front.half_close import HalfClose
from nodeagent.front.ordinary_road import OrdinaryRoad
from nodeagent.front.protocol import RequestEvent, RequestParser
from nodeagent.front.server import ASGIApp


async def test_an_unexpected_error_ends_its_own_connection_only_and_is_logged_with_the_peer(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_parser: RequestParser, _data: bytes) -> list[RequestEvent]:
        raise RuntimeError("an unexpected error")

    with trio.fail_after(5):
        served = await start_serving(nursery, hello)
        async with await served.connect() as peer:
            with monkeypatch.context() as patch:
                patch.setattr(RequestParser, "feed", fail)
                await peer.send(GET)
                assert await peer.rest() == b""
            host, port = peer.stream.socket.getsockname()
        await assert_serves(served)
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert f"{host}:{port}" in record.getMessage()
    assert "an unexpected error" in caplog.text


async def test_an_idle_connection_is_closed_after_the_keep_alive_timeout(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, quart_app(), keep_alive_timeout_s=0.3)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"hello")
            begun = trio.current_time()
            assert await peer.rest() == b""
    assert 0.2 < trio.current_time() - begun < 2


async def test_a_connection_is_kept_alive_for_the_next_request(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, quart_app(), keep_alive_timeout_s=30)
        async with await served.connect() as peer:
            for _ in range(3):
                await peer.send(GET)
                assert (await peer.until(b"hello")).startswith(b"HTTP/1.1 200")


async def test_a_client_that_asks_for_it_gets_its_connection_closed_at_once(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, quart_app(), keep_alive_timeout_s=30)
        assert (await served.ask(GET_AND_CLOSE)).endswith(b"hello")


async def test_headers_that_trickle_in_time_out(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, hello, keep_alive_timeout_s=0.3)
        async with await served.connect() as peer:
            await peer.send(b"GET / HTTP/1.1\r\n")
            async with trio.open_nursery() as trickle:
                trickle.start_soon(_trickle_headers, peer.stream)
                await peer.rest()
                trickle.cancel_scope.cancel()


async def _trickle_headers(stream: trio.SocketStream) -> None:
    try:
        while True:
            await stream.send_all(b"x: y\r\n")
            await trio.sleep(0.05)
    except trio.BrokenResourceError:
        return


async def test_a_client_that_leaves_while_idle_is_closed(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, hello, keep_alive_timeout_s=60, graceful_timeout_s=60)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"hello")
            await peer.stream.send_eof()
            assert await peer.rest() == b""


async def test_a_client_that_does_not_read_is_closed_after_the_send_timeout(nursery: trio.Nursery) -> None:
    torrent = Torrent()
    with trio.fail_after(5):
        served = await start_serving(nursery, torrent, send_timeout_s=0.3)
        async with await served.connect() as peer:
            await peer.send(GET)
            await torrent.ended.wait()


async def test_a_client_that_reads_slowly_but_steadily_is_served(nursery: trio.Nursery) -> None:
    size = 2**23

    async def large(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": bytes(size), "more_body": False})

    with trio.fail_after(10):
        served = await start_serving(nursery, large, send_timeout_s=0.5)
        async with await served.connect() as peer:
            peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**16)
            await peer.send(GET_AND_CLOSE)
            got = 0
            while data := await peer.stream.receive_some(2**18):
                got += len(data)
                await trio.sleep(0.01)
    assert got > size


async def test_a_silent_answer_outlives_the_keep_alive_timeout(nursery: trio.Nursery) -> None:
    held = Held()
    with trio.fail_after(5):
        served = await start_serving(nursery, held, keep_alive_timeout_s=0.2)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"first\r\n")
            with trio.move_on_after(0.6):
                await held.left.wait()
            held.finish.set()
            assert await peer.until(b"0\r\n\r\n") == b"4\r\nlast\r\n0\r\n\r\n"


async def test_a_client_that_leaves_is_noticed_within_the_grace(nursery: trio.Nursery) -> None:
    held = Held()
    with trio.fail_after(5):
        served = await start_serving(nursery, held)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"first\r\n")
        with trio.fail_after(1):
            await held.left.wait()


@pytest.mark.parametrize("policy", HalfClose)
async def test_a_reset_ends_the_request_at_once_whatever_its_policy(policy: HalfClose, nursery: trio.Nursery) -> None:
    held = Held(policy)
    with trio.fail_after(5):
        served = await start_serving(nursery, held)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"first\r\n")
            await peer.stream.send_eof()
            await wait_all_tasks_blocked()
            peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with trio.fail_after(0.3):
            await held.left.wait()


async def test_a_client_that_has_closed_its_sending_side_gets_its_answers(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, quart_app())
        async with await served.connect() as peer:
            await peer.send(GET + GET)
            await peer.stream.send_eof()
            assert (await peer.rest()).count(b"hello") == 2


async def test_a_stream_goes_on_for_a_client_that_stays_and_stops_with_the_next_write_to_one_that_left(
    nursery: trio.Nursery,
) -> None:
    """The application writes once when the input ends, which a client that has left answers with a reset."""
    left = trio.Event()

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        scope["nodeagent.on_half_close"](HalfClose.STREAM)
        try:
            await scope["nodeagent.half_closed"].wait()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b": here", "more_body": True})
            async with trio.open_nursery() as tasks:
                tasks.start_soon(_cancel_at_disconnect, receive, tasks.cancel_scope)
                await trio.sleep(0.8)
                await send({"type": "http.response.body", "body": b"last", "more_body": False})
                tasks.cancel_scope.cancel()
        finally:
            left.set()

    with trio.fail_after(5):
        served = await start_serving(nursery, app)
        async with await served.connect() as stays:
            await stays.send(GET)
            await stays.stream.send_eof()
            assert b"last" in await stays.rest()
        left = trio.Event()
        async with await served.connect() as leaves:
            await leaves.send(GET)
        with trio.fail_after(0.4):
            await left.wait()


async def _cancel_at_disconnect(receive: Receive, scope: trio.CancelScope) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
    scope.cancel()


@pytest.mark.parametrize(("policy", "bound_s"), [(HalfClose.GRACE, 0.5), (HalfClose.STREAM, 0.5)])
async def test_a_silent_request_ends_after_its_grace(policy: HalfClose, bound_s: float, nursery: trio.Nursery) -> None:
    held = Held(policy)
    with trio.fail_after(5):
        served = await start_serving(nursery, held)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"first\r\n")
            begun = trio.current_time()
            await peer.stream.send_eof()
            await held.left.wait()
    assert bound_s <= trio.current_time() - begun + 0.01 < bound_s + 0.4


async def test_a_client_that_leaves_is_noticed_behind_a_second_request(nursery: trio.Nursery) -> None:
    held = Held()
    with trio.fail_after(5):
        served = await start_serving(nursery, held)
        async with await served.connect() as peer:
            await peer.send(GET + GET)
            await peer.until(b"first\r\n")
            # The server reads no further while it can't use it, so the end is behind unread bytes.
            await peer.send(GET * 1000)
            await wait_all_tasks_blocked()
            assert not held.left.is_set()
        with trio.fail_after(1):
            await held.left.wait()


async def test_requests_sent_together_are_answered_in_turn(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, quart_app())
        answer = await served.ask(GET + GET + GET_AND_CLOSE)
    assert answer.count(b"HTTP/1.1 200") == 3


async def test_a_request_behind_the_last_answer_does_not_keep_the_connection(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, hello, graceful_timeout_s=60)
        answer = await served.ask(GET_AND_CLOSE + GET)
        assert answer.count(b"HTTP/1.1 200") == 1
        served.shutdown.set()
        await served.ended.wait()


async def hello_at_last(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answers without having read the body, when no more of it can arrive because nothing reads it."""
    await wait_all_tasks_blocked()
    await hello(scope, receive, send)


@pytest.mark.parametrize("app", [hello, hello_at_last])
async def test_an_answer_reaches_a_client_that_still_sends_its_body(app: ASGIApp, nursery: trio.Nursery) -> None:
    body = bytes(2**24)
    head = b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: %d\r\n\r\n" % len(body)
    with trio.fail_after(5):
        served = await start_serving(nursery, app, graceful_timeout_s=60)
        assert (await served.ask(head + body)).endswith(b"hello")
        # Nothing of it is left behind.
        served.shutdown.set()
        await served.ended.wait()


async def test_a_connection_is_described_by_its_peer_and_whether_it_is_busy(nursery: trio.Nursery) -> None:
    held = Held()
    shared = Shared(
        ordinary_road=OrdinaryRoad(held),
        find_handler=lambda _method, _path: None,
        keep_alive_timeout_s=60,
        send_timeout_s=60,
    )
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(5):
        async with listener, Peer(await open_stream_to_socket_listener(listener)) as peer:
            connection = Connection(shared, await listener.accept())
            address = f"127.0.0.1:{peer.stream.socket.getsockname()[1]}"
            assert repr(connection) == f"<Connection {address} idle>"
            nursery.start_soon(connection.run)
            await peer.send(GET)
            await peer.until(b"first")
            assert repr(connection) == f"<Connection {address} busy>"
            held.finish.set()
            await peer.until(b"last")
            await wait_all_tasks_blocked()
            assert repr(connection) == f"<Connection {address} idle>"


async def test_the_task_of_a_request_is_named_after_it_and_its_parent_after_the_connection(
    nursery: trio.Nursery,
) -> None:
    names: list[str] = []

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        task = trio.lowlevel.current_task()
        assert task.parent_nursery is not None
        names.extend([task.name, task.parent_nursery.parent_task.name])
        await hello(scope, receive, send)

    with trio.fail_after(5):
        served = await start_serving(nursery, app)
        async with await served.connect() as peer:
            await peer.send(b"GET /v1/models?x=y HTTP/1.1\r\nHost: n\r\n\r\n")
            await peer.until(b"hello")
            address = f"127.0.0.1:{peer.stream.socket.getsockname()[1]}"
    assert names == [f"GET /v1/models {address}", f"connection {address}"]
