"""The server by real sockets: where it listens, and how it shuts down."""

import itertools
import logging
from typing import Any

import httpx
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from fakes.asgi import Held, Receive, Send, Torrent, hello
from fakes.serving import GET, assert_serves, quart_app, start_serving
from nodeagent import descriptors
from nodeagent.errors import StartupError
from nodeagent.front.connection import Connection
from nodeagent.front.ordinary import _hypercorn_config
from nodeagent.front.server import bind, serve


async def test_shutdown_does_not_wait_for_idle_clients(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, quart_app(), keep_alive_timeout_s=60, graceful_timeout_s=60)
        async with await served.connect() as used, await served.connect() as never_used:
            await used.send(GET)
            await used.until(b"hello")
            served.shutdown.set()
            await served.ended.wait()
            assert await used.rest() == await never_used.rest() == b""


async def test_shutdown_does_not_wait_for_clients_that_connect_meanwhile(nursery: trio.Nursery) -> None:
    shutdown = trio.Event()
    shutdown.set()
    with trio.fail_after(5):
        listeners, port = await bind("127.0.0.1", 0)
        async with await trio.open_tcp_stream("127.0.0.1", port):
            await serve(hello, listeners, shutdown=shutdown, keep_alive_timeout_s=60, graceful_timeout_s=60)


async def test_a_client_that_does_not_read_does_not_delay_the_shutdown(nursery: trio.Nursery) -> None:
    torrent = Torrent()
    with trio.fail_after(5):
        served = await start_serving(nursery, torrent, send_timeout_s=60, graceful_timeout_s=0.3)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"\r\n\r\n")
            served.shutdown.set()
            await served.ended.wait()
    assert torrent.ended.is_set()


async def test_shutdown_closes_the_listener_at_once_and_finishes_the_requests_in_flight(nursery: trio.Nursery) -> None:
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


async def test_an_answer_that_outlasts_the_graceful_timeout_is_visibly_truncated(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, Held(), graceful_timeout_s=0.2)
        async with await served.connect() as peer:
            await peer.send(GET)
            await peer.until(b"first\r\n")
            served.shutdown.set()
            await served.ended.wait()
            assert await peer.rest() == b""


@pytest.mark.parametrize("error", [RuntimeError, RecursionError, OverflowError, UnicodeError])
async def test_an_unforeseen_error_on_a_connection_closes_that_one_alone(
    error: type[Exception], nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, runs = Connection.run, itertools.count()

    async def first_fails(connection: Connection) -> None:
        if next(runs) == 0:
            raise error("unforeseen")
        await run(connection)

    monkeypatch.setattr(Connection, "run", first_fails)
    with trio.fail_after(5):
        served = await start_serving(nursery, quart_app())
        async with await served.connect() as peer:
            assert await peer.rest() == b""
        await assert_serves(served)
    assert caplog.messages == ["unexpected error while serving a connection; the node goes on"]
    nursery.cancel_scope.cancel()


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


async def test_rude_clients_leave_nothing_behind(nursery: trio.Nursery) -> None:
    """A shutdown waits for none of two hundred clients that came and went, some without manners."""
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


async def test_the_unspecified_ipv6_address_accepts_ipv4_clients_too(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        listeners, _ = await bind("::", 0)
        await assert_serves(await start_serving(nursery, hello, listeners=listeners))


async def test_a_port_in_use_is_reported_in_one_line() -> None:
    [listener], port = await bind("127.0.0.1", 0)
    with trio.fail_after(5), listener.socket, pytest.raises(StartupError) as raised:
        await bind("127.0.0.1", port)
    assert str(raised.value) == (
        f"can't listen on 127.0.0.1:{port}: another process already listens there (listen_host, listen_port)"
    )


@pytest.mark.parametrize(
    ("host", "reason"),
    [("192.0.2.1", "no interface of this host has that address"), ("no.such.host.invalid", "has no address")],
)
async def test_a_host_that_can_not_be_bound_is_reported_in_one_line(host: str, reason: str) -> None:
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


async def test_of_idle_connections_the_one_that_has_been_idle_the_longest_is_closed_and_none_that_is_busy(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held()
    with trio.fail_after(10):
        served = await start_serving(nursery, held)
        async with await served.connect() as busy, await served.connect() as early, await served.connect():
            await busy.send(GET)
            await busy.until(b"\r\n\r\n")
            limit = descriptors.in_use() * 4 // 3  # so that all but the reserve is taken
            monkeypatch.setattr(descriptors, "limit", lambda: limit)
            async with await served.connect():
                assert await early.rest() == b""
            held.finish.set()
            await busy.until(b"0\r\n\r\n")
        served.shutdown.set()
        await served.ended.wait()
