"""The server, by real sockets: what clients can do to it, and how it ends.

Most tests stand for a way in which hypercorn's own TCPServer, or quart-trio on it, lets a client harm the daemon.
"""

import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest
import trio
from openai import APIConnectionError, AsyncOpenAI
from quart import Response
from quart_trio import QuartTrio
from trio.testing import wait_all_tasks_blocked

from fakes.serving import Served, start_serving
from nodeagent.errors import StartupError
from nodeagent.front.server import AbortResponse, ASGIApp, _hypercorn_config, bind, serve

GET = b"GET / HTTP/1.1\r\nHost: node\r\n\r\n"
GET_AND_CLOSE = b"GET / HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n"
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


async def hello(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """Answers without having read the body."""
    headers = [(b"content-length", b"5")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"hello", "more_body": False})


class Held:
    """An application that streams its first bytes, and ends when it is told to or its client leaves."""

    def __init__(self) -> None:
        self.finish = trio.Event()
        self.left = trio.Event()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._notice_leaving, receive, nursery.cancel_scope)
            await self.finish.wait()
            await send({"type": "http.response.body", "body": b"last", "more_body": False})
            nursery.cancel_scope.cancel()

    async def _notice_leaving(self, receive: Receive, scope: trio.CancelScope) -> None:
        while (await receive())["type"] != "http.disconnect":
            continue
        self.left.set()
        scope.cancel()


class Torrent:
    """An application that writes as fast as its client reads, for ever."""

    def __init__(self) -> None:
        self.written_bytes = 0
        self.ended = trio.Event()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write, send)
                while (await receive())["type"] != "http.disconnect":
                    continue
                nursery.cancel_scope.cancel()
        finally:
            self.ended.set()

    async def _write(self, send: Send) -> None:
        while True:
            await send({"type": "http.response.body", "body": bytes(2**20), "more_body": True})
            self.written_bytes += 2**20


def quart_app() -> QuartTrio:
    app = QuartTrio(__name__, static_folder=None)
    app.config["RESPONSE_TIMEOUT"] = None

    @app.get("/")
    async def index() -> str:
        return "hello"

    return app


async def assert_serves(served: Served) -> None:
    answer = await served.ask(GET_AND_CLOSE)
    assert answer.startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "packet",
    [
        b"GET / HTTP/1.1\r\nHost: n\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
        b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\nX",
        b"GET / HTTP/1.1\r\nHost: n\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        b"HTTP2-Settings: !!!\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64,
        b"GET ?x HTTP/1.1\r\nHost: n\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: n\r\n\r\n",
        b"CONNECT n:80 HTTP/1.1\r\nHost: n\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    ids=["websocket", "h2c", "http2", "no-path", "bad-url", "connect", "tls"],
)
async def test_no_single_packet_harms_the_server(
    packet: bytes, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, quart_app())
        async with await served.connect() as peer:
            await peer.send(packet)
            await peer.stream.send_eof()
            await peer.rest()
        await assert_serves(served)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_an_upgrade_is_ignored_and_its_request_answered(nursery: trio.Nursery) -> None:
    upgrade = (
        b"GET / HTTP/1.1\r\nHost: n\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: \r\n\r\n"
    )
    with trio.fail_after(5):
        served = await start_serving(nursery, hello)
        async with await served.connect() as peer:
            await peer.send(upgrade)
            assert (await peer.until(b"hello")).startswith(b"HTTP/1.1 200")
            await peer.send(GET)
            assert (await peer.until(b"hello")).startswith(b"HTTP/1.1 200")


class FaultyStream:
    """A stream on which reading meets a fault of ours."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.socket = stream.socket
        self.aclose = stream.aclose

    async def receive_some(self, _max_bytes: int) -> bytes:
        raise RuntimeError("a fault of ours")


class FaultyAtFirst(trio.abc.Listener[Any]):
    """A listener whose first connection is faulty."""

    def __init__(self, listener: trio.SocketListener) -> None:
        self.socket = listener.socket
        self._listener = listener
        self._accepted = 0

    async def accept(self) -> Any:
        stream = await self._listener.accept()
        self._accepted += 1
        return FaultyStream(stream) if self._accepted == 1 else stream

    async def aclose(self) -> None:
        await self._listener.aclose()


async def test_a_connection_that_fails_within_ends_alone_and_is_logged_with_its_peer(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    [listener], _ = await bind("127.0.0.1", 0)
    faulty: Any = FaultyAtFirst(listener)
    with trio.fail_after(5):
        served = await start_serving(nursery, hello, listeners=[faulty])
        async with await served.connect() as peer:
            assert await peer.rest() == b""
            host, port = peer.stream.socket.getsockname()
        await assert_serves(served)
    [record] = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert f"{host}:{port}" in record.getMessage()
    assert "a fault of ours" in caplog.text


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


async def test_headers_that_trickle_in_end_at_the_keep_alive_timeout(nursery: trio.Nursery) -> None:
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


async def test_the_server_lets_go_of_a_client_that_leaves_while_idle(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, hello, keep_alive_timeout_s=60, graceful_timeout_s=60)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"hello")
            await peer.stream.send_eof()
            assert await peer.rest() == b""


async def test_shutdown_does_not_wait_for_idle_clients(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, quart_app(), keep_alive_timeout_s=60, graceful_timeout_s=60)
        async with await served.connect() as used, await served.connect() as never_used:
            await used.send(GET)
            await used.until(b"hello")
            served.shutdown.set()
            await served.ended.wait()
            assert await used.rest() == await never_used.rest() == b""


async def test_shutdown_does_not_wait_for_clients_that_it_meets_on_the_way(nursery: trio.Nursery) -> None:
    shutdown = trio.Event()
    shutdown.set()
    with trio.fail_after(5):
        listeners, port = await bind("127.0.0.1", 0)
        async with await trio.open_tcp_stream("127.0.0.1", port):
            await serve(hello, listeners, shutdown=shutdown, keep_alive_timeout_s=60, graceful_timeout_s=60)


async def test_a_client_that_does_not_read_is_cut_off_after_the_send_timeout(nursery: trio.Nursery) -> None:
    torrent = Torrent()
    with trio.fail_after(5):
        served = await start_serving(nursery, torrent, send_timeout_s=0.3)
        async with await served.connect() as peer:
            await peer.send(GET)
            await torrent.ended.wait()


async def test_a_client_that_does_not_read_holds_up_no_shutdown(nursery: trio.Nursery) -> None:
    torrent = Torrent()
    with trio.fail_after(5):
        served = await start_serving(nursery, torrent, send_timeout_s=60, graceful_timeout_s=0.3)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"\r\n\r\n")
            served.shutdown.set()
            await served.ended.wait()
    assert torrent.ended.is_set()


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


async def test_a_client_that_leaves_is_noticed_at_once(nursery: trio.Nursery) -> None:
    held = Held()
    with trio.fail_after(5):
        served = await start_serving(nursery, held)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"first\r\n")
        with trio.fail_after(0.5):
            await held.left.wait()


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
    """Answers without having read the body, when no more of it can come because nobody reads it."""
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


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde", 400),
        (b"POST / HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 501),
        (b"POST / HTTP/1.1\r\nHost: n\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: n\r\nX : y\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: n\r\n" + b"a: b\r\n" * 101 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: n\r\na: " + b"b" * 40_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: n\r\na: " + b"b" * 200_000, 431),
        (b"GET /" + b"b" * 40_000 + b" HTTP/1.1\r\nHost: n\r\n\r\n", 431),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (b"GET ?x HTTP/1.1\r\nHost: n\r\n\r\n", 400),
    ],
)
async def test_an_ambiguous_or_oversized_request_is_refused_and_its_connection_closed(
    request_: bytes, status: int, nursery: trio.Nursery
) -> None:
    served_requests = []

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        served_requests.append(scope)
        await hello(scope, receive, send)

    with trio.fail_after(5):
        served = await start_serving(nursery, app)
        head, _, body = (await served.ask(request_)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d" % status)
    assert b"x-request-id: " in head
    assert b"invalid_request_error" in body or status >= 500
    assert served_requests == []


async def test_a_refused_head_request_gets_no_body(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, hello)
        head = await served.ask(b"HEAD x HTTP/1.1\r\nHost: n\r\n\r\n")
        # What can't even be read after a HEAD request is answered in full.
        answers = await served.ask(b"HEAD / HTTP/1.1\r\nHost: n\r\n\r\n\0\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert head.endswith(b"\r\n\r\n")
    assert answers.endswith(b"}")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_the_absolute_form_of_a_target_is_the_path_in_it(nursery: trio.Nursery) -> None:
    paths = []

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        paths.append((scope["path"], scope["query_string"]))
        await hello(scope, receive, send)

    with trio.fail_after(5):
        served = await start_serving(nursery, app)
        await served.ask(b"GET http://n/a/b?c=d HTTP/1.1\r\nHost: n\r\n\r\n" + GET_AND_CLOSE)
        await served.ask(b"GET http://n HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")
    assert paths == [("/a/b", b"c=d"), ("/", b""), ("/", b"")]


async def test_shutdown_closes_the_listener_at_once_and_finishes_what_is_under_way(nursery: trio.Nursery) -> None:
    held = Held()
    with trio.fail_after(5):
        served = await start_serving(nursery, held, graceful_timeout_s=60)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"first\r\n")
            served.shutdown.set()
            await wait_all_tasks_blocked()
            with pytest.raises(OSError, match="all attempts to connect"):
                await served.connect()
            assert not served.ended.is_set()
            held.finish.set()
            assert (await peer.rest()).endswith(b"4\r\nlast\r\n0\r\n\r\n")
        await served.ended.wait()


async def test_an_answer_begun_after_shutdown_says_that_its_connection_closes(nursery: trio.Nursery) -> None:
    begin = trio.Event()

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        begun.set()
        await begin.wait()
        await hello(scope, receive, send)

    with trio.fail_after(5):
        begun = trio.Event()
        served = await start_serving(nursery, app, graceful_timeout_s=60)
        async with await served.connect() as peer:
            await peer.send(GET)
            await begun.wait()
            served.shutdown.set()
            await wait_all_tasks_blocked()
            begin.set()
            assert b"connection: close" in (await peer.rest()).lower()


async def test_what_outlasts_the_graceful_timeout_is_cut_and_shows_it(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, Held(), graceful_timeout_s=0.2)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"first\r\n")
            served.shutdown.set()
            await served.ended.wait()
            assert await peer.rest() == b""


async def test_cancelling_the_server_ends_it_at_once_and_closes_everything(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, Held(), graceful_timeout_s=60)
        async with await served.connect() as peer, await served.connect() as idle:
            await peer.send(GET)
            await peer.until(b"first\r\n")
            served.scope.cancel()
            with trio.fail_after(1):
                await served.ended.wait()
            assert await peer.rest() == await idle.rest() == b""
        with pytest.raises(OSError, match="all attempts to connect"):
            await served.connect()


def aborting_app() -> QuartTrio:
    app = quart_app()

    async def broken_off() -> AsyncIterator[bytes]:
        yield b'data: {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}\n\n'
        raise AbortResponse("the server behind it died")

    @app.get("/stream")
    @app.post("/v1/chat/completions")
    async def stream() -> Response:
        return Response(broken_off(), content_type="text/event-stream")

    return app


async def test_a_stream_that_is_aborted_never_looks_finished(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(10):
        served = await start_serving(nursery, aborting_app())
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
                await client.get(f"{served.url}/stream")
        answer = await served.ask(b"GET /stream HTTP/1.1\r\nHost: n\r\n\r\n")
    assert b"data: " in answer
    assert not answer.endswith(b"0\r\n\r\n")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_openai_clients_see_an_aborted_stream_as_an_error(nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        served = await start_serving(nursery, aborting_app())
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hello"}], stream=True
            )
            assert (await anext(stream)).id == "x"
            with pytest.raises(APIConnectionError):
                await anext(stream)


async def test_an_aborted_stream_resets_the_connection_of_a_client_that_knows_no_chunks(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, aborting_app())
        async with await served.connect() as peer:
            await peer.send(b"GET /stream HTTP/1.0\r\n\r\n")
            with pytest.raises(trio.BrokenResourceError):
                await peer.rest()


async def test_an_application_that_fails_in_mid_answer_breaks_it_off_and_is_logged(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        raise ValueError("a fault of the application")

    with trio.fail_after(5):
        served = await start_serving(nursery, app)
        assert (await served.ask(GET)).endswith(b"5\r\nfirst\r\n")
        [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "a fault of the application" in caplog.text
    assert record.levelno == logging.ERROR


async def test_the_connections_are_refused_nothing_by_what_others_do(nursery: trio.Nursery) -> None:
    """Two hundred clients that came and went, some rudely, leave nothing behind that a shutdown would wait for."""
    with trio.fail_after(20):
        served = await start_serving(nursery, quart_app(), keep_alive_timeout_s=60, graceful_timeout_s=60)
        for number in range(200):
            async with await served.connect() as peer:
                await peer.send([GET, GET + GET[:9], b"", b"\0", GET[:20]][number % 5])
                if number % 2:
                    await peer.stream.send_eof()
        await assert_serves(served)
        served.shutdown.set()
        with trio.fail_after(3):
            await served.ended.wait()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "0.0.0.0", "::"])
async def test_every_kind_of_host_is_bound_on_one_port(host: str, nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        listeners, port = await bind(host, 0)
        assert {listener.socket.getsockname()[1] for listener in listeners} == {port}
        await start_serving(nursery, hello, listeners=listeners)
        address = "[::1]" if host in ("::1", "::") else "127.0.0.1"
        async with httpx.AsyncClient() as client:
            assert (await client.get(f"http://{address}:{port}/")).text == "hello"


async def test_the_unspecified_ipv6_address_takes_ipv4_clients_too(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        listeners, _ = await bind("::", 0)
        await assert_serves(await start_serving(nursery, hello, listeners=listeners))


async def test_a_taken_port_is_said_in_one_line() -> None:
    [listener], port = await bind("127.0.0.1", 0)
    with trio.fail_after(5), listener.socket, pytest.raises(StartupError) as raised:
        await bind("127.0.0.1", port)
    assert str(raised.value) == (
        f"can't listen on 127.0.0.1:{port}: another process listens there already (listen_host, listen_port)"
    )


@pytest.mark.parametrize(
    ("host", "reason"),
    [("192.0.2.1", "no interface of this host has that address"), ("no.such.host.invalid", "no address")],
)
async def test_a_host_that_can_not_be_bound_is_said_in_one_line(host: str, reason: str) -> None:
    with trio.fail_after(20), pytest.raises(StartupError, match=reason) as raised:
        await bind(host, 0)
    assert host in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_misspelt_setting_of_hypercorn_is_an_error() -> None:
    with pytest.raises(AttributeError, match="keep_alive_timeuot"):
        _hypercorn_config(keep_alive_timeuot=5)


async def test_hypercorn_puts_no_handler_of_its_own_on_its_loggers(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        await assert_serves(await start_serving(nursery, hello))
    assert logging.getLogger("hypercorn.error").handlers == logging.getLogger("hypercorn.access").handlers == []
