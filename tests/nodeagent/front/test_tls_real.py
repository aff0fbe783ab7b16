"""Our server with TLS, on real sockets, against the TLS of trio and of OpenSSL."""

import json
import logging
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trustme
from trio.testing import wait_all_tasks_blocked

from fakes.asgi import hello
from fakes.serving import GET, GET_AND_CLOSE, Served, quart_app, start_serving
from nodeagent.front.asgi import Front
from nodeagent.front.connection import _is_this_host
from nodeagent.front.exchange import Exchange, Handler
from nodeagent.front.server import AbortResponse

AUTHORITY = trustme.CA()
CERTIFICATE = AUTHORITY.issue_cert("127.0.0.1")
LONG = b"x" * 5_000_000


def server_context(
    *, client_ca: trustme.CA | None = None, certificate: trustme.LeafCert = CERTIFICATE
) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    certificate.configure_cert(context)
    if client_ca is not None:
        client_ca.configure_trust(context)
        context.verify_mode = ssl.CERT_OPTIONAL
    return context


def client_context(*, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    context = ssl.create_default_context()
    AUTHORITY.configure_trust(context)
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.maximum_version = version
    return context


async def serving(nursery: trio.Nursery, app: Any = None, **options: Any) -> Served:
    context = server_context()
    front = Front(app or quart_app(), max_request_bytes=2**20)
    return await start_serving(nursery, front, **{"find_tls": lambda: context, **options})


Stream = trio.SSLStream[trio.SocketStream]


@asynccontextmanager
async def connected(served: Served, context: ssl.SSLContext | None = None) -> AsyncIterator[Stream]:
    """Truncation is an error of this client: it expects the server to say goodbye."""
    plain = await trio.open_tcp_stream("127.0.0.1", served.port)
    stream = trio.SSLStream(plain, context or client_context(), server_hostname="127.0.0.1", https_compatible=False)
    try:
        await stream.do_handshake()
        yield stream
    finally:
        await trio.aclose_forcefully(plain)


async def rest(stream: Stream) -> bytes:
    found = b""
    while data := await stream.receive_some(2**16):
        found += data
    return found


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_requests_are_served_one_after_another_and_the_end_is_said(
    version: ssl.TLSVersion, nursery: trio.Nursery
) -> None:
    with trio.fail_after(10):
        served = await serving(nursery)
        async with connected(served, client_context(version=version)) as stream:
            assert stream.selected_alpn_protocol() == "http/1.1"
            await stream.send_all(GET + GET)
            await stream.send_all(GET_AND_CLOSE)
            assert (await rest(stream)).count(b"HTTP/1.1 200") == 3
    nursery.cancel_scope.cancel()


async def long_answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(LONG))]})
    await send({"type": "http.response.body", "body": LONG, "more_body": False})


async def test_an_answer_that_fills_the_socket_arrives_whole(nursery: trio.Nursery) -> None:
    with trio.fail_after(20):
        served = await serving(nursery, long_answer)
        async with connected(served) as stream:
            await stream.send_all(GET_AND_CLOSE)
            await trio.sleep(0.2)  # the socket fills
            assert (await rest(stream)).endswith(LONG)
    nursery.cancel_scope.cancel()


async def test_a_request_in_tiny_pieces_of_records_is_read(nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        served = await serving(nursery)
        async with connected(served) as stream:
            for byte in GET_AND_CLOSE:
                await stream.send_all(bytes([byte]))
            assert (await rest(stream)).startswith(b"HTTP/1.1 200")
    nursery.cancel_scope.cancel()


async def scheme_of(scope: Any, receive: Any, send: Any) -> None:
    body = str(scope["scheme"]).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def test_the_application_knows_that_the_address_is_https(nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        served = await serving(nursery, scheme_of)
        async with connected(served) as stream:
            await stream.send_all(GET_AND_CLOSE)
            assert (await rest(stream)).endswith(b"\r\n\r\nhttps")
    nursery.cancel_scope.cancel()


async def test_a_client_that_speaks_plain_http_is_told_so(nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        served = await serving(nursery)
        head, _, body = (await served.ask(GET_AND_CLOSE)).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400")
    assert "use https://" in json.loads(body)["error"]["message"]
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("sent", [b"\x16\x03\x01\xff\xff" + b"\xff" * 100, b"\x00" * 64, b""])
async def test_what_is_no_tls_ends_its_own_connection_only(sent: bytes, nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        served = await serving(nursery)
        async with await served.connect() as peer:
            await peer.send(sent)
            await peer.stream.send_eof()
            await peer.rest()
        async with connected(served) as stream:
            await stream.send_all(GET_AND_CLOSE)
            assert (await rest(stream)).startswith(b"HTTP/1.1 200")
    nursery.cancel_scope.cancel()


async def test_a_client_that_resets_its_connection_in_the_handshake_is_no_error(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(10):
        served = await serving(nursery)
        async with await served.connect() as peer:
            await peer.send(b"\x16\x03")
            await wait_all_tasks_blocked()
            peer.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await wait_all_tasks_blocked(0.05)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    nursery.cancel_scope.cancel()


async def test_a_handshake_that_does_not_go_on_times_out(nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        served = await serving(nursery, keep_alive_timeout_s=0.2)
        async with await served.connect() as peer:
            await peer.send(b"\x16\x03")
            assert await peer.rest() == b""
    nursery.cancel_scope.cancel()


async def test_a_truncated_answer_ends_without_a_goodbye(nursery: trio.Nursery) -> None:
    async def abort(exchange: Exchange) -> None:
        await exchange.start(200, [], b"some", more=True)
        raise AbortResponse

    def find(_method: str, _path: bytes) -> Handler:
        return abort

    with trio.fail_after(10):
        served = await serving(nursery, find_handler=find)
        async with connected(served) as stream:
            await stream.send_all(b"GET / HTTP/1.0\r\n\r\n")
            with pytest.raises(trio.BrokenResourceError):
                await rest(stream)
    nursery.cancel_scope.cancel()


async def test_a_client_that_says_goodbye_after_its_request_gets_its_answer(nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        served = await serving(nursery, hello)
        plain = await trio.open_tcp_stream("127.0.0.1", served.port)
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = client_context().wrap_bio(incoming, outgoing, server_hostname="127.0.0.1")
        for step in (tls.do_handshake, lambda: tls.write(GET), tls.unwrap):
            while True:
                try:
                    step()
                except ssl.SSLWantReadError:
                    await plain.send_all(outgoing.read())
                    if step == tls.unwrap:
                        break
                    incoming.write(await plain.receive_some())
                else:
                    break
        answer = b""
        while data := await plain.receive_some():
            answer += data
        incoming.write(answer)
        # OpenSSL gives no data after its own goodbye; that the server has sent a record of the answer's size tells.
        assert len(answer) > 100
        await plain.aclose()
    nursery.cancel_scope.cancel()


async def test_a_new_certificate_is_for_new_connections(nursery: trio.Nursery) -> None:
    other = trustme.CA()
    contexts = [server_context(), server_context(certificate=other.issue_cert("127.0.0.1"))]
    with trio.fail_after(10):
        served = await serving(nursery, find_tls=lambda: contexts[0])
        async with connected(served) as stream:
            contexts.pop(0)
            await stream.send_all(GET_AND_CLOSE)
            assert (await rest(stream)).startswith(b"HTTP/1.1 200")
        with pytest.raises(trio.BrokenResourceError):
            async with connected(served):
                pytest.fail("the certificate of another authority was accepted")
    nursery.cancel_scope.cancel()


async def test_clients_of_other_hosts_need_a_certificate_and_those_of_this_one_need_none(
    nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = trustme.CA()
    context = server_context(client_ca=clients)
    known, stranger = client_context(), client_context()
    clients.issue_cert("client@example.org").configure_cert(known)
    trustme.CA().issue_cert("client@example.org").configure_cert(stranger)
    with trio.fail_after(10):
        served = await serving(nursery, find_tls=lambda: context)
        async with connected(served) as stream:
            await stream.send_all(GET_AND_CLOSE)
            assert (await rest(stream)).startswith(b"HTTP/1.1 200")
        # All clients of a test are on this host.
        monkeypatch.setattr("nodeagent.front.connection._is_this_host", lambda _address: False)
        async with connected(served) as stream:
            assert b"HTTP/1.1 403" in await rest(stream)
        async with connected(served, known) as stream:
            await stream.send_all(GET_AND_CLOSE)
            assert (await rest(stream)).startswith(b"HTTP/1.1 200")
        with pytest.raises(trio.BrokenResourceError):
            async with connected(served, stranger) as stream:
                await rest(stream)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("address", "is_here"),
    [
        ("127.0.0.1", True),
        ("127.3.0.1", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("10.0.0.1", False),
        ("::ffff:10.0.0.1", False),
        ("fe80::1", False),
    ],
)
def test_an_address_of_loopback_is_this_host(address: str, is_here: bool) -> None:
    assert _is_this_host(address) is is_here
