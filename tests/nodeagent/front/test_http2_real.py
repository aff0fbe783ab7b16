"""HTTP/2 on real sockets: what clients get, and what they can do to it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
import trustme
from h2.errors import ErrorCodes
from h2.events import StreamReset
from trio.testing import wait_all_tasks_blocked

from fakes.asgi import Held, Receive, Send, hello, read_all
from fakes.http2_client import AUTHORITY, GET, POST, client_context, connected, server_context
from fakes.http2_serving import LONG, HeldExchange, all_by, count_body, serving
from nodeagent import descriptors
from nodeagent.front.exchange import Exchange


async def test_httpx_uses_one_connection_for_requests_at_once(nursery: trio.Nursery) -> None:
    together = trio.Event()
    here = 0
    peers: set[Any] = set()

    async def meet(scope: Any, receive: Receive, send: Send) -> None:
        nonlocal here
        peers.add(scope["client"])
        assert (scope["http_version"], scope["scheme"]) == ("2", "https")
        here += 1
        if here == 10:
            together.set()
        await together.wait()
        await hello(scope, receive, send)

    answers: list[httpx.Response] = []

    async def ask(client: httpx.AsyncClient, url: str) -> None:
        answers.append(await client.post(url, content=b"some"))

    with trio.fail_after(20):
        served = await serving(nursery, meet)
        url = f"https://127.0.0.1:{served.port}/"
        context = client_context("h2", "http/1.1")
        async with (
            httpx.AsyncClient(verify=context, http2=True, trust_env=False) as client,
            trio.open_nursery() as clients,
        ):
            for _ in range(10):
                clients.start_soon(ask, client, url)
    assert [(answer.http_version, answer.text) for answer in answers] == [("HTTP/2", "hello")] * 10
    assert len(peers) == 1
    nursery.cancel_scope.cancel()


FIRST = """
import httpx, sys, trio
from fakes.asgi import hello
from fakes.http2_client import client_context, server_context
from fakes.serving import start_serving

async def ask(url):
    async with httpx.AsyncClient(verify=client_context(), http2=True, trust_env=False) as client:
        print((await client.get(url)).http_version)

async def main():
    assert "nodeagent.front.http2" not in sys.modules
    context = server_context()
    async with trio.open_nursery() as nursery:
        served = await start_serving(nursery, hello, find_tls=lambda: context)
        async with trio.open_nursery() as clients:
            for _ in range(8):
                clients.start_soon(ask, f"https://127.0.0.1:{served.port}/")
        nursery.cancel_scope.cancel()

trio.run(main)
"""


def test_clients_that_are_the_first_together_are_all_served() -> None:
    """Its module is imported for them, in a process of their own."""
    argv = [sys.executable, "-c", FIRST]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.stdout.splitlines() == ["HTTP/2"] * 8, done.stderr


async def test_curl_uploads_a_long_body_and_gets_a_long_answer(nursery: trio.Nursery, tmp_path: Path) -> None:
    async def echo(exchange: Exchange) -> None:
        parts, more = [], True
        while more:
            message = await exchange.receive()
            parts.append(message["body"])
            more = message["more_body"]
        await exchange.start(200, [(b"content-type", b"text/plain")], b"".join(parts), more=False)

    (tmp_path / "long").write_bytes(LONG)
    AUTHORITY.cert_pem.write_to_path(tmp_path / "ca.pem")
    with trio.fail_after(30):
        served = await serving(nursery, find_handler=all_by(echo))
        curl = ["curl", "--silent", "--show-error", "--noproxy", "*", "--http2", "--cacert", str(tmp_path / "ca.pem")]
        curl += ["--data-binary", f"@{tmp_path / 'long'}", "--output", str(tmp_path / "got"), "-w", "%{http_version}"]
        done = await trio.run_process([*curl, f"https://127.0.0.1:{served.port}/"], capture_stdout=True)
    assert done.stdout == b"2"
    assert (tmp_path / "got").read_bytes() == LONG
    nursery.cancel_scope.cancel()


async def test_a_client_without_alpn_or_http2_speaks_http_1_1(nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        served = await serving(nursery)
        for protocols in (["http/1.1"], ["http/1.1", "spdy/3"]):
            async with httpx.AsyncClient(verify=client_context(*protocols), trust_env=False) as client:
                answer = await client.get(f"https://127.0.0.1:{served.port}/")
                assert (answer.http_version, answer.text) == ("HTTP/1.1", "hello")
    nursery.cancel_scope.cancel()


async def test_a_response_has_no_headers_of_the_connection(nursery: trio.Nursery) -> None:
    async def answer(exchange: Exchange) -> None:
        fields = [(b"Connection", b"close"), (b"Keep-Alive", b"x"), (b"Transfer-Encoding", b"chunked"), (b"X-A", b"b")]
        await exchange.start(200, fields, b"some", more=False)

    with trio.fail_after(10):
        served = await serving(nursery, find_handler=all_by(answer))
        async with connected(served.port) as client:
            for _ in range(2):  # and `close` ends nothing
                found = await client.answer(await client.request())
                assert (found.status, found.body, found.complete) == (200, b"some", True)
                assert found.headers.keys() == {"x-a", "date"}
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ["fast", "ordinary"])
async def test_the_answer_to_head_has_no_body(road: str, nursery: trio.Nursery) -> None:
    async def some(exchange: Exchange) -> None:
        await exchange.start(200, [(b"content-length", b"5")], b"hello", more=False)

    with trio.fail_after(10):
        options = {"find_handler": all_by(some)} if road == "fast" else {}
        served = await serving(nursery, **options)
        async with connected(served.port) as client:
            found = await client.answer(await client.request([(":method", "HEAD"), *GET[1:]]))
    assert (found.status, found.headers["content-length"], found.body, found.complete) == (200, "5", b"", True)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ["fast", "ordinary"])
async def test_a_client_that_waits_for_a_100_gets_one(road: str, nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        options = {"find_handler": all_by(count_body)} if road == "fast" else {}
        served = await serving(nursery, read_all, **options)
        async with connected(served.port) as client:
            number = await client.request([*POST, ("expect", "100-continue")], end=False)
            while not client.answers[number].proceeds:
                await client.receive()
            await client.upload(number, b"some")
            assert (await client.answer(number)).status == 200
    nursery.cancel_scope.cancel()


# The life of a connection.


async def test_an_idle_connection_is_told_and_closed_after_the_keep_alive_timeout(nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        served = await serving(nursery, keep_alive_timeout_s=0.3)
        async with connected(served.port) as client:
            assert (await client.answer(await client.request())).body == b"hello"
            goodbye = await client.end()
    assert goodbye is not None
    assert (goodbye.error_code, goodbye.last_stream_id) == (ErrorCodes.NO_ERROR, 1)


async def test_pings_do_not_keep_an_idle_connection_and_a_request_does(nursery: trio.Nursery) -> None:
    held = HeldExchange()

    async def ping(client: Any) -> None:
        while True:
            client.h2.ping(b"12345678")
            await client.flush()
            await trio.sleep(0.05)

    with trio.fail_after(10):
        served = await serving(nursery, find_handler=all_by(held), keep_alive_timeout_s=0.4)
        async with connected(served.port) as client:
            number = await client.request()
            await client.until(number, b"first")
            await trio.sleep(0.8)
            held.finish.set()
            assert (await client.answer(number)).complete
        async with connected(served.port) as client, trio.open_nursery() as pinging:
            pinging.start_soon(ping, client)
            while client.goaway is None:
                assert await client.receive() is not None
            pinging.cancel_scope.cancel()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ["fast", "ordinary"])
async def test_a_drain_finishes_the_streams_in_flight_and_refuses_new_ones(road: str, nursery: trio.Nursery) -> None:
    app, held = Held(), HeldExchange()
    with trio.fail_after(10):
        options = {"find_handler": all_by(held)} if road == "fast" else {}
        served = await serving(nursery, app, graceful_timeout_s=60, **options)
        async with connected(served.port) as idle, connected(served.port) as client:
            number = await client.request()
            await client.until(number, b"first")
            served.shutdown.set()
            goodbye = await idle.end()
            assert goodbye is not None
            while client.goaway is None:
                await client.receive()
            assert (client.goaway.error_code, client.goaway.last_stream_id) == (ErrorCodes.NO_ERROR, number)
            (held if road == "fast" else app).finish.set()
            while b"last" not in client.answers[number].body:
                await client.receive()
            await client.end()
            assert client.answers[number].complete
        await served.ended.wait()


async def test_a_stream_that_comes_after_the_goodbye_is_refused(nursery: trio.Nursery) -> None:
    held = HeldExchange()
    with trio.fail_after(10):
        served = await serving(nursery, find_handler=all_by(held), graceful_timeout_s=60)
        async with connected(served.port) as client:
            number = await client.request()
            await client.until(number, b"first")
            served.shutdown.set()
            await wait_all_tasks_blocked()
            # Sent before the client has read the goodbye.
            late = await client.request()
            reset = await client.first(StreamReset)
            assert (reset.stream_id, reset.error_code) == (late, ErrorCodes.REFUSED_STREAM)
            held.finish.set()
            await client.answer(number)
        await served.ended.wait()


async def test_an_answer_that_outlasts_the_graceful_timeout_is_visibly_truncated(nursery: trio.Nursery) -> None:
    held = HeldExchange()
    with trio.fail_after(10):
        served = await serving(nursery, find_handler=all_by(held), graceful_timeout_s=0.2)
        async with connected(served.port) as client:
            number = await client.request()
            await client.until(number, b"first")
            served.shutdown.set()
            await served.ended.wait()
            await client.end()
            assert not client.answers[number].complete
            assert client.answers[number].reset == ErrorCodes.INTERNAL_ERROR


async def test_a_client_that_says_goodbye_gets_the_answers_that_it_waits_for(nursery: trio.Nursery) -> None:
    held = HeldExchange()
    with trio.fail_after(10):
        served = await serving(nursery, find_handler=all_by(held))
        async with connected(served.port) as client:
            number = await client.request()
            await client.until(number, b"first")
            # h2 itself would end everything with it.
            await client.stream.send_all(b"\0\0\x08\x07\0" + bytes(12))
            held.finish.set()
            assert (await client.answer(number)).body == b"firstlast"
            assert await client.end() is not None
    nursery.cancel_scope.cancel()


async def test_of_connections_at_the_limit_an_idle_one_is_closed_and_none_with_a_stream(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldExchange()
    with trio.fail_after(10):
        served = await serving(nursery, find_handler=all_by(held))
        async with connected(served.port) as busy, connected(served.port) as idle:
            number = await busy.request()
            await busy.until(number, b"first")
            limit = descriptors.in_use() * 4 // 3  # so that all but the reserve is taken
            monkeypatch.setattr(descriptors, "limit", lambda: limit)
            async with connected(served.port):
                assert (await idle.end()).error_code == ErrorCodes.NO_ERROR
            held.finish.set()
            assert (await busy.answer(number)).body == b"firstlast"
            assert busy.goaway is None
    nursery.cancel_scope.cancel()


async def test_a_stranger_gets_a_403_for_each_request(nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    clients = trustme.CA()
    context = server_context(client_ca=clients)
    known = client_context()
    clients.issue_cert("client@example.org").configure_cert(known)
    monkeypatch.setattr("nodeagent.front.connection._is_this_host", lambda _address: False)
    with trio.fail_after(10):
        served = await serving(nursery, find_tls=lambda: context)
        async with connected(served.port) as client:
            for _ in range(2):
                found = await client.answer(await client.request())
                assert found.status == 403
                assert "certificate" in json.loads(found.body)["error"]["message"]
        async with connected(served.port, context=known) as client:
            assert (await client.answer(await client.request())).body == b"hello"
    nursery.cancel_scope.cancel()
