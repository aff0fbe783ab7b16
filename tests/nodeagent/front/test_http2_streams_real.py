"""Streams of HTTP/2 on real sockets: windows, clients that leave, answers that break off."""

import gc
import weakref
from typing import Any

import pytest
import trio
from h2.errors import ErrorCodes
from h2.events import StreamReset
from trio.testing import wait_all_tasks_blocked

from fakes.asgi import Held, Receive, Send, Torrent, hello, read_all
from fakes.http2_client import GET, POST, Answer, connected
from fakes.http2_serving import LONG, HeldExchange, all_by, count_body, long_answer, serving
from nodeagent.front.exchange import AbortResponse, Exchange

# Flow control.


@pytest.mark.parametrize("road", ["fast", "ordinary"])
async def test_a_slow_reader_of_one_stream_does_not_stop_the_others(road: str, nursery: trio.Nursery) -> None:
    async def by_path(exchange: Exchange) -> None:
        await (long_answer if exchange.path == b"/long" else count_body)(exchange)

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        body = LONG if scope["path"] == "/long" else b"0"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body, "more_body": False})

    with trio.fail_after(20):
        options = {"find_handler": all_by(by_path)} if road == "fast" else {}
        served = await serving(nursery, app, **options)
        async with connected(served.port, reads_bodies=False) as client:
            client.h2.increment_flow_control_window(2**24)  # of the connection alone
            slow = await client.request([*GET[:3], (":path", "/long")])
            await client.until(slow, b"x" * 65535)
            for _ in range(3):
                assert (await client.answer(await client.request())).body == b"0"
            assert len(client.answers[slow].body) == 65535, "the window was not kept"
            client.reads_bodies = True
            client.h2.increment_flow_control_window(2**24, slow)
            await client.flush()
            assert (await client.answer(slow)).body == LONG
    nursery.cancel_scope.cancel()


async def test_an_answer_waits_for_the_window_of_the_connection(nursery: trio.Nursery) -> None:
    with trio.fail_after(20):
        served = await serving(nursery, find_handler=all_by(long_answer))
        async with connected(served.port, reads_bodies=False, window=2**20) as client:
            first, second = await client.request(), await client.request()
            while sum(len(answer.body) for answer in client.answers.values()) < 65535:
                await client.receive()
            client.h2.ping(b"12345678")
            await client.flush()
            await client.receive()
            assert sum(len(answer.body) for answer in client.answers.values()) == 65535
            client.h2.increment_flow_control_window(2**24)
            for number in (first, second):
                client.h2.increment_flow_control_window(2**23, number)
            await client.flush()
            assert [(await client.answer(number)).body for number in (first, second)] == [LONG, LONG]
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ["fast", "ordinary"])
async def test_a_client_that_opens_no_window_loses_that_stream_only(
    road: str, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    torrent = Torrent()
    with trio.fail_after(20):
        find = {"fast": lambda _method, path: long_answer if path == b"/long" else count_body}.get(road)
        options = {} if find is None else {"find_handler": find}
        served = await serving(nursery, torrent, send_timeout_s=0.3, **options)
        async with connected(served.port, reads_bodies=False) as client:
            client.h2.increment_flow_control_window(2**24)
            stuck = await client.answer(await client.request([*GET[:3], (":path", "/long")]))
            assert (stuck.status, stuck.complete, stuck.reset) == (200, False, ErrorCodes.INTERNAL_ERROR)
            if road == "fast":
                assert (await client.answer(await client.request())).status == 200
            else:
                await torrent.ended.wait()
    assert "opened too little of its window for 0.3 s" in caplog.text
    nursery.cancel_scope.cancel()


async def test_a_client_that_does_not_read_is_closed_after_the_send_timeout(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    torrent = Torrent()
    with trio.fail_after(20):
        served = await serving(nursery, torrent, send_timeout_s=0.3)
        async with connected(served.port, window=2**30) as client:
            client.h2.increment_flow_control_window(2**30)
            await client.request()
            await torrent.ended.wait()
    assert "client read too little for 0.3 s; closing the connection" in caplog.text
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ["fast", "ordinary"])
async def test_a_body_is_received_only_as_it_is_read(road: str, nursery: trio.Nursery) -> None:
    go_on = trio.Event()

    async def late(exchange: Exchange) -> None:
        await go_on.wait()
        await count_body(exchange)

    async def late_app(scope: Any, receive: Receive, send: Send) -> None:
        await go_on.wait()
        await read_all(scope, receive, send)

    with trio.fail_after(20):
        options = {"find_handler": all_by(late)} if road == "fast" else {}
        served = await serving(nursery, late_app, **options)
        async with connected(served.port) as client:
            number = await client.request(POST, end=False)
            sent = 0
            while room := client.h2.local_flow_control_window(number):
                client.send_data(number, bytes(room))
                await client.flush()
                sent += room
                with trio.move_on_after(0.2):
                    await client.receive()
            assert 2**16 < sent < 2**21
            assert client.h2.outbound_flow_control_window > 0, "one stream has taken the window of all"
            go_on.set()
            await client.upload(number, LONG)
            found = await client.answer(number)
    assert found.status == 200
    if road == "fast":
        assert found.body == b"%d" % (sent + len(LONG))
    nursery.cancel_scope.cancel()


async def test_padding_is_given_back(nursery: trio.Nursery) -> None:
    with trio.fail_after(20):
        served = await serving(nursery, find_handler=all_by(count_body))
        async with connected(served.port) as client:
            number = await client.request(POST, end=False)
            for _ in range(8000):  # twice the window of the connection
                while client.h2.local_flow_control_window(number) < 300:
                    await client.receive()
                client.h2.send_data(number, b"", pad_length=255)
                await client.flush()
            client.h2.end_stream(number)
            await client.flush()
            assert (await client.answer(number)).body == b"0"
    nursery.cancel_scope.cancel()


async def test_a_request_that_is_over_is_freed_without_the_garbage_collector(nursery: trio.Nursery) -> None:
    served_ones: list[weakref.ref[Exchange]] = []

    async def note(exchange: Exchange) -> None:
        served_ones.append(weakref.ref(exchange))
        await exchange.start(200, [], b"some", more=False)

    with trio.fail_after(10):
        served = await serving(nursery, find_handler=all_by(note))
        async with connected(served.port) as client:
            gc.disable()
            try:
                await client.answer(await client.request(POST, b"some"))
                await wait_all_tasks_blocked()
                assert [reference() for reference in served_ones] == [None]
            finally:
                gc.enable()
    nursery.cancel_scope.cancel()


# Clients that leave, and answers that break off.


@pytest.mark.parametrize("road", ["fast", "ordinary"])
@pytest.mark.parametrize("how", ["reset", "close", "abort", "error"])
async def test_a_client_that_leaves_ends_its_request(how: str, road: str, nursery: trio.Nursery) -> None:
    app, held = Held(), HeldExchange()
    with trio.fail_after(10):
        options = {"find_handler": all_by(held)} if road == "fast" else {}
        served = await serving(nursery, app, **options)
        async with connected(served.port) as client:
            number = await client.request()
            await client.until(number, b"first")
            match how:
                case "reset":
                    client.h2.reset_stream(number, ErrorCodes.CANCEL)
                    await client.flush()
                case "close":
                    await client.stream.transport_stream.send_eof()
                case "abort":
                    await trio.aclose_forcefully(client.stream.transport_stream)
                case "error":
                    client.h2.close_connection(ErrorCodes.INTERNAL_ERROR)
                    await client.flush()
            await (held if road == "fast" else app).left.wait()
            if how == "reset":
                other = await client.request()
                await client.until(other, b"first")
    nursery.cancel_scope.cancel()


async def test_an_answer_that_waits_for_the_socket_ends_with_its_connection(nursery: trio.Nursery) -> None:
    torrent, held = Torrent(), Held()

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await (torrent if scope["path"] == "/torrent" else held)(scope, receive, send)

    with trio.fail_after(10):
        served = await serving(nursery, app, graceful_timeout_s=60)
        async with connected(served.port, window=2**30) as client:
            client.h2.increment_flow_control_window(2**30)
            await client.request([*GET[:3], (":path", "/torrent")])
            # Nothing is read, so the socket is full before this one begins to answer.
            await wait_all_tasks_blocked(0.2)
            await client.request()
            await wait_all_tasks_blocked(0.2)
            await client.stream.transport_stream.send_eof()
            served.shutdown.set()
            await served.ended.wait()


@pytest.mark.parametrize("road", ["fast", "ordinary"])
async def test_the_end_of_a_stream_is_only_that_of_its_body(road: str, nursery: trio.Nursery) -> None:
    app, held = Held(), HeldExchange()
    with trio.fail_after(10):
        options = {"find_handler": all_by(held)} if road == "fast" else {}
        served = await serving(nursery, app, **options)
        async with connected(served.port) as client:
            number = await client.request()
            await client.until(number, b"first")
            with trio.move_on_after(0.8):  # on HTTP/1.1 the end of input would end it after half a second
                await (held if road == "fast" else app).left.wait()
            (held if road == "fast" else app).finish.set()
            assert (await client.answer(number)).body == b"firstlast"
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("fault", [AbortResponse, RuntimeError])
async def test_a_truncated_answer_is_a_reset_and_the_connection_goes_on(
    fault: type[Exception], nursery: trio.Nursery
) -> None:
    async def breaks(exchange: Exchange) -> None:
        if exchange.path == b"/whole":
            await exchange.start(200, [], b"whole", more=False)
            return
        await exchange.start(200, [], b"some", more=True)
        raise fault

    async def app(scope: Any, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"some", "more_body": True})
        raise fault

    for options in ({"find_handler": all_by(breaks)}, {}):
        with trio.fail_after(10):
            served = await serving(nursery, app, **options)
            async with connected(served.port) as client:
                for _ in range(2):
                    found = await client.answer(await client.request())
                    assert found == Answer(200, found.headers, b"some", reset=ErrorCodes.INTERNAL_ERROR)
                if options:
                    whole = await client.answer(await client.request([*GET[:3], (":path", "/whole")]))
                    assert whole.complete
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ["fast", "ordinary"])
async def test_an_answer_reaches_a_client_that_still_sends_its_body(road: str, nursery: trio.Nursery) -> None:
    async def at_once(exchange: Exchange) -> None:
        await exchange.start(413, [], b"hello", more=False)

    with trio.fail_after(20):
        options = {"find_handler": all_by(at_once)} if road == "fast" else {}
        served = await serving(nursery, hello, **options)
        async with connected(served.port) as client:
            number = await client.request(POST, b"x" * 60_000, end=False)
            found = await client.answer(number)
            assert (found.body, found.complete, found.reset) == (b"hello", True, None)
            await client.upload(number, LONG)  # what nobody reads makes room all the same
            assert (await client.answer(await client.request())).body == b"hello"
            # One that does not end is cut off.
            number = await client.request(POST, end=False)
            await client.answer(number)
            assert (await client.first(StreamReset)).error_code == ErrorCodes.NO_ERROR
    nursery.cancel_scope.cancel()
