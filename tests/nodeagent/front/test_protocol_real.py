"""What the server accepts as a request, by bytes on real sockets."""

import logging
from typing import Any

import pytest
import trio

from fakes.asgi import Receive, Send, hello
from fakes.serving import GET, GET_AND_CLOSE, assert_serves, quart_app, start_serving


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
