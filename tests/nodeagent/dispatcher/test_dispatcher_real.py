"""The client against a real HTTP server that comes, goes and misbehaves."""

import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import pytest
import trio

from fakes.node_source import FakeNodeSource
from nodeagent.dispatcher.client import DispatcherClient

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

FAULTS: dict[str, tuple[bytes, str]] = {
    "404": (b"HTTP/1.1 404 X\r\nContent-Length: 0\r\n\r\n", "404"),
    "500": (b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n", "500"),
    "garbage": (b"SSH-2.0-OpenSSH_9.2\r\n", "call failed"),
    "garbage body": (b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\n<html/>", "unusable body"),
    "huge": (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b" " * 100_000, "longer than 65536"),
    "redirect": (b"HTTP/1.1 302 X\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n", "302"),
    "half": (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", "call failed"),
    "nothing": (b"", "call failed"),
}


class Server:
    """Responds to every request with the same bytes and closes the connection; remembers the calls."""

    def __init__(self) -> None:
        self.response = OK
        self.calls: list[str] = []

    async def handle(self, stream: trio.SocketStream) -> None:
        async with stream:
            request = b""
            while b"\r\n\r\n" not in request:
                request += await stream.receive_some(65536)
            self.calls.append(request.split(b" ")[1].decode().rpartition("/")[2])
            await stream.send_all(self.response)

    @asynccontextmanager
    async def listening(self, port: int = 0) -> AsyncIterator[int]:
        async with trio.open_nursery() as nursery:
            listeners = await nursery.start(partial(trio.serve_tcp, self.handle, port, host="127.0.0.1"), name="server")
            yield listeners[0].socket.getsockname()[1]
            nursery.cancel_scope.cancel()


class NoWait(random.Random):
    """Makes every back-off and jitter 10 ms."""

    def uniform(self, a: float, b: float) -> float:
        return 0.01


def client_at(port: int) -> DispatcherClient:
    url = f"http://127.0.0.1:{port}"
    return DispatcherClient(url, token=None, node=FakeNodeSource(), heartbeat_interval_s=0.05, rng=NoWait())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110  (the client has no event for its state)
        await trio.sleep(0.01)


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_bad_response_is_reported_and_a_good_one_ends_the_problem(fault: str) -> None:
    server = Server()
    with trio.fail_after(10):
        async with server.listening() as port, trio.open_nursery() as nursery:
            client = client_at(port)
            await nursery.start(client.run, name="client")
            await until(lambda: "heartbeat" in server.calls)
            server.response, reported = FAULTS[fault]
            await until(lambda: client.problem is not None)
            assert reported in str(client.problem)
            server.response = OK
            server.calls.clear()
            await until(lambda: client.problem is None and "heartbeat" in server.calls)
            assert ("register" in server.calls) == (fault == "404")
            nursery.cancel_scope.cancel()


async def test_the_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    server = Server()
    with trio.fail_after(10):
        async with server.listening() as port, trio.open_nursery() as nursery:
            client = client_at(port)
            await nursery.start(client.run, name="client")
            await until(lambda: client.registered or client.problem is not None)
            assert (client.registered, client.problem) == (True, None)
            nursery.cancel_scope.cancel()


async def test_the_dispatcher_can_start_after_the_node_and_restart() -> None:
    server = Server()
    with trio.fail_after(10):
        async with server.listening() as port:
            pass
        async with trio.open_nursery() as nursery:
            client = client_at(port)
            await nursery.start(client.run, name="client")
            await until(lambda: client.problem is not None)
            for _ in range(2):
                async with server.listening(port):
                    await until(lambda: client.problem is None and client.registered)
                await until(lambda: client.problem is not None)
            nursery.cancel_scope.cancel()
