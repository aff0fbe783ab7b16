"""What a client may not do to the node by HTTP/2, on real sockets. `h2spec` tests the protocol itself."""

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest
import trio
from h2.errors import ErrorCodes
from h2.events import SettingsAcknowledged
from h2.settings import SettingCodes
from trio.testing import wait_all_tasks_blocked

from fakes import http2_client
from fakes.asgi import Held, Receive, Send, hello
from fakes.http2_client import GET, POST, Http2Client, connected
from fakes.serving import Served, start_serving
from nodeagent.front.http2 import _Engine
from nodeagent.front.transport import Transport


async def serving(nursery: trio.Nursery, app: Any, **options: Any) -> Served:
    context = http2_client.server_context()
    return await start_serving(nursery, app, find_tls=lambda: context, **options)


async def assert_serves(served: Served) -> None:
    context = http2_client.client_context("h2", "http/1.1")
    async with httpx.AsyncClient(verify=context, http2=True, trust_env=False) as client:
        assert (await client.get(f"https://127.0.0.1:{served.port}/")).status_code == 200


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


@pytest.mark.parametrize(
    "fields",
    [
        [*GET, ("connection", "close")],
        [*GET, ("transfer-encoding", "chunked")],
        [*GET, ("X-Upper", "1")],
        [*GET, ("x", "1\r\nhost: evil")],
        [*GET, ("host", "evil")],
        [*GET, (":path", "/other")],
        [*GET[:3], (":path", "http://n/")],
    ],
)
async def test_a_malformed_request_is_reset_and_the_connection_goes_on(
    fields: list[tuple[str, str]], nursery: trio.Nursery
) -> None:
    asked: list[Any] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        asked.append(scope["path"])
        await hello(scope, receive, send)

    with trio.fail_after(10):
        served = await serving(nursery, app)
        async with connected(served.port) as client:
            found = await client.answer(await client.request(fields))
            assert (found.status, found.reset) == (0, ErrorCodes.PROTOCOL_ERROR)
            assert asked == []
            assert (await client.answer(await client.request())).body == b"hello"
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("trailers", "code"),
    [([], ErrorCodes.PROTOCOL_ERROR), ([(":path", "/")], ErrorCodes.PROTOCOL_ERROR), ([("x", "1")], None)],
)
async def test_trailers_are_dropped_and_hide_neither_a_shorter_body_nor_a_malformed_header(
    trailers: list[tuple[str, str]], code: int | None, nursery: trio.Nursery
) -> None:
    bodies: list[str] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        message = await receive()
        while message.get("more_body"):
            message = await receive()
        bodies.append(str(message["type"]))
        await hello(scope, receive, send)

    with trio.fail_after(10):
        served = await serving(nursery, app)
        async with connected(served.port) as client:
            length = "4" if trailers else "5"
            number = await client.request([*POST, ("content-length", length)], b"some", end=False)
            client.h2.send_headers(number, trailers or [("x", "1")], end_stream=True)
            await client.flush()
            found = await client.answer(number)
            assert found.reset == code
            if code is None:
                assert found.body == b"hello"
            else:
                assert "http.request" not in bodies
    nursery.cancel_scope.cancel()


async def test_a_body_of_another_length_than_announced_ends_the_connection(nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        served = await serving(nursery, hello)
        for body in (b"some", b"longer"):
            async with connected(served.port) as client:
                await client.request([*POST, ("content-length", "5")], body)
                assert (await client.end()).error_code == ErrorCodes.PROTOCOL_ERROR
        await assert_serves(served)
    nursery.cancel_scope.cancel()


async def test_a_head_over_the_limit_is_a_431_and_one_far_over_it_the_end(nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        served = await serving(nursery, hello)
        async with connected(served.port) as client:
            found = await client.answer(await client.request([*GET, ("x", "a" * 33_000)]))
            assert found.status == 431
            assert json.loads(found.body)["error"]["code"] == "request_header_fields_too_large"
            assert (
                await client.answer(await client.request([*GET, *((f"x{n}", "a") for n in range(101))]))
            ).status == 431
            assert (await client.answer(await client.request())).body == b"hello"
            # A few bytes that are a long list of headers to the node: each refers to the first.
            await client.request([*GET, *((("y", "b" * 4000),) * 40)])
            assert (await client.end()).error_code == ErrorCodes.ENHANCE_YOUR_CALM
    nursery.cancel_scope.cancel()


async def _reset_at_once(client: Http2Client) -> None:
    for _ in range(1000):
        number = client.h2.get_next_available_stream_id()
        client.h2.send_headers(number, GET, end_stream=True)
        client.h2.reset_stream(number, ErrorCodes.CANCEL)
        await client.flush()


async def _have_streams_reset(client: Http2Client) -> None:
    while client.goaway is None:
        number = client.h2.get_next_available_stream_id()
        client.h2.send_headers(number, [*GET, ("te", "gzip")], end_stream=True)
        await client.flush()
        while client.h2.open_outbound_streams > 100 and client.goaway is None:
            await client.receive()


async def _overflow_windows(client: Http2Client) -> None:
    while client.goaway is None:
        number = client.h2.get_next_available_stream_id()
        client.h2.send_headers(number, GET, end_stream=True)
        client.h2._data_to_send += frame(8, (2**31 - 1).to_bytes(4, "big"), stream=number)
        await client.flush()
        while client.h2.open_outbound_streams > 100 and client.goaway is None:
            await client.receive()


def _sends(data: bytes, *, stream: bool = False) -> Callable[[Http2Client], Any]:
    async def send(client: Http2Client) -> None:
        if stream:
            await client.request(POST, end=False)
        await client.stream.send_all(data)

    return send


@pytest.mark.parametrize(
    "flood",
    [
        _reset_at_once,
        _have_streams_reset,
        _overflow_windows,
        _sends(frame(6, b"12345678") * 2000),
        _sends(frame(4) * 2000),
        _sends(frame(2, bytes(5), stream=3) * 2000),
        _sends(frame(0, stream=1) * 2000, stream=True),
        _sends(frame(8, b"\0\0\0\1") * 2000),
        _sends(frame(1, b"\x82", stream=1) + frame(9, b"", stream=1) * 2000),
        _sends(frame(1, b"\x82", stream=1) + frame(9, bytes(16000), stream=1) * 10),
    ],
    ids=["resets", "faults", "windows", "pings", "settings", "priorities", "data", "updates", "empty heads", "heads"],
)
async def test_a_flood_ends_its_own_connection_and_nothing_else(flood: Any, nursery: trio.Nursery) -> None:
    app = Held()
    app.finish.set()
    with trio.fail_after(20):
        served = await serving(nursery, app)
        async with connected(served.port) as client:
            with suppress(trio.BrokenResourceError):  # it may end meanwhile
                await flood(client)
            assert (await client.end()).error_code == ErrorCodes.ENHANCE_YOUR_CALM
        await assert_serves(served)
        # All of its requests have ended.
        served.shutdown.set()
        await served.ended.wait()


async def test_some_resets_are_no_flood(nursery: trio.Nursery) -> None:
    with trio.fail_after(20):
        served = await serving(nursery, Held())
        async with connected(served.port) as client:
            for _ in range(100):
                number = await client.request()
                client.h2.reset_stream(number, ErrorCodes.CANCEL)
                await client.flush()
            await client.until(await client.request(), b"first")
    nursery.cancel_scope.cancel()


async def test_a_client_has_a_limit_of_streams_at_once(nursery: trio.Nursery) -> None:
    with trio.fail_after(20):
        served = await serving(nursery, Held())
        async with connected(served.port) as client:
            assert client.h2.remote_settings.max_concurrent_streams == 128
            for _ in range(128):
                number = await client.request()
            await client.until(number, b"first")
            client.h2.remote_settings._settings[3] = client.h2.remote_settings._settings[4].copy()
            client.h2.remote_settings._settings[3][0] = 1000
            await client.request()
            assert (await client.end()).error_code in (ErrorCodes.PROTOCOL_ERROR, ErrorCodes.REFUSED_STREAM)
    nursery.cancel_scope.cancel()


async def test_frames_that_need_an_answer_do_not_pile_up_for_a_client_that_does_not_read(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    transports: list[Transport] = []

    class Seen(Transport):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            transports.append(self)

        def put(self, data: bytes) -> None:
            super().put(data)
            if self.unsent_bytes > 2**17:
                much_waits.set()

    much_waits = trio.Event()
    monkeypatch.setattr("nodeagent.front.connection.Transport", Seen)
    with trio.fail_after(60):
        served = await serving(nursery, Held())
        async with connected(served.port) as client:
            number = await client.request()
            await client.until(number, b"first")
            client.h2.reset_stream(number, ErrorCodes.CANCEL)
            await client.flush()
            [transport] = transports
            late = frame(0, b"x", stream=number) * 1000  # each is answered by a reset

            async def send_on() -> None:
                while True:
                    await client.stream.transport_stream.send_all(client_bytes(client, late))

            async with trio.open_nursery() as sending:
                sending.start_soon(send_on)
                await much_waits.wait()
                # Now it reads no more, however much there is.
                await wait_all_tasks_blocked(0.1)
                assert transport.unsent_bytes < 2**18
                sending.cancel_scope.cancel()
    nursery.cancel_scope.cancel()


def client_bytes(client: Http2Client, data: bytes) -> bytes:
    """The record of TLS, without waiting for anything to be read."""
    client.stream._ssl_object.write(data)
    return client.stream._outgoing.read()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: n\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(1, b"\xff\xff\xff\xff\xff", flags=5, stream=1),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(7, b"\0"),
        b"\0" * 64,
        b"",
    ],
)
async def test_what_is_no_http2_ends_its_own_connection_only(sent: bytes, nursery: trio.Nursery) -> None:
    with trio.fail_after(20):
        served = await serving(nursery, hello)
        plain = await trio.open_tcp_stream("127.0.0.1", served.port)
        stream = trio.SSLStream(plain, http2_client.client_context(), server_hostname="127.0.0.1")
        await stream.send_all(sent)
        await plain.send_eof()
        with suppress(trio.BrokenResourceError):
            while await stream.receive_some():
                continue
        await trio.aclose_forcefully(plain)
        await assert_serves(served)
    nursery.cancel_scope.cancel()


async def test_settings_that_a_client_makes_up_are_not_kept_and_the_table_of_headers_stays_small(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[_Engine] = []

    class Seen(_Engine):
        def __init__(self) -> None:
            super().__init__()
            engines.append(self)

    monkeypatch.setattr("nodeagent.front.http2._Engine", Seen)
    made_up = [number.to_bytes(2, "big") + bytes(4) for number in range(1000, 2000)]
    with trio.fail_after(10):
        served = await serving(nursery, hello)
        async with connected(served.port) as client:
            for start in range(0, 1000, 200):
                await client.stream.send_all(frame(4, b"".join(made_up[start : start + 200]) * 2))
            client.h2.update_settings({SettingCodes.HEADER_TABLE_SIZE: 2**32 - 1})
            await client.flush()
            await client.first(SettingsAcknowledged)
            assert (await client.answer(await client.request())).body == b"hello"
        [engine] = engines
        assert len(engine.remote_settings) < 20
        assert engine.encoder.header_table_size == 2**12
    nursery.cancel_scope.cancel()


async def test_no_header_is_logged(nursery: trio.Nursery, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with trio.fail_after(10):
        served = await serving(nursery, hello)
        async with connected(served.port) as client:
            await client.answer(await client.request([*GET, ("authorization", "Bearer secret")]))
    assert "secret" not in caplog.text
    nursery.cancel_scope.cancel()


async def test_a_reset_in_the_same_packet_as_its_request_starts_nothing(nursery: trio.Nursery) -> None:
    asked: list[Any] = []

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        asked.append(scope["path"])
        await hello(scope, receive, send)

    with trio.fail_after(10):
        served = await serving(nursery, app)
        async with connected(served.port) as client:
            gone = client.h2.get_next_available_stream_id()
            client.h2.send_headers(gone, [*GET[:3], (":path", "/gone")], end_stream=True)
            client.h2.reset_stream(gone, ErrorCodes.CANCEL)
            # This one is malformed besides.
            odd = client.h2.get_next_available_stream_id()
            client.h2.send_headers(odd, [*GET, ("te", "gzip")], end_stream=True)
            client.h2.reset_stream(odd, ErrorCodes.CANCEL)
            assert (await client.answer(await client.request())).body == b"hello"
    assert asked == ["/"]
    nursery.cancel_scope.cancel()
