"""Readiness: the child's own address, its health, its alias.

The servers of these tests run in this process, so to the probe it is the child.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import pytest
import trio

from fakes.http_stub import response, start_http_stub
from nodeagent.llama_server.probe import LlamaServerProbe
from supervisor.listening import Listener
from supervisor.output import Output
from supervisor.probe import NotReady, ProcessView


class Process:
    """A process as the probe sees it: this one, unless another is named."""

    def __init__(self, *lines: str, generation: int = 1, pid: int = 0, group: tuple[int, ...] = ()) -> None:
        self.generation = generation
        self.pid = pid or os.getpid()
        self.output = Output(lambda _line: None)
        self.output.feed("".join(f"{line}\n" for line in lines).encode())
        self._group = group

    def group_pids(self) -> list[int]:
        return [self.pid, *self._group]


class Server:
    """Answers `/health` with a status, and `/v1/models` with a name."""

    def __init__(self, *, health: int = 200, name: str = "mine") -> None:
        self.health = health
        self.name = name
        self.asked: list[str] = []

    async def start(self, nursery: trio.Nursery) -> str:
        listeners = await nursery.start(partial(trio.serve_tcp, self._handle, 0, host="127.0.0.1"))
        return f"127.0.0.1:{listeners[0].socket.getsockname()[1]}"

    async def _handle(self, stream: trio.SocketStream) -> None:
        async with stream:
            request = (await stream.receive_some(65536)).decode()
            path = request.split(" ")[1]
            self.asked.append(path)
            assert "authorization: Bearer key" in request or "Authorization: Bearer key" in request
            names = json.dumps({"data": [{"id": self.name}]})
            status, body = (self.health, "{}") if path == "/health" else (200, names)
            await stream.send_all(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())


async def check(probe: LlamaServerProbe, process: Process) -> str:
    with trio.fail_after(5):
        return await probe.check(cast(ProcessView, process))


@contextmanager
def idle_process() -> Iterator[int]:
    """The pid of a process that listens nowhere."""
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


async def test_a_server_that_is_healthy_and_has_our_name_is_ready_at_the_address_where_it_listens(
    nursery: trio.Nursery,
) -> None:
    address = await Server().start(nursery)
    assert await check(LlamaServerProbe("mine", "key"), Process()) == address
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("port", ["{port}", "99999999999999999999", "0", "-1", "\u0663"])
async def test_what_a_child_prints_says_nothing_about_its_address(port: str, nursery: trio.Nursery) -> None:
    spy = Server()
    line = f"listening on http://127.0.0.1:{port.format(port=(await spy.start(nursery)).rpartition(':')[2])}"
    with idle_process() as pid, pytest.raises(NotReady, match="it listens nowhere yet"):
        await check(LlamaServerProbe("mine", "key"), Process(line, pid=pid))
    assert spy.asked == []
    nursery.cancel_scope.cancel()


async def test_of_several_addresses_the_first_that_is_ready_counts(nursery: trio.Nursery) -> None:
    for other in (Server(health=404), Server(name="other")):
        await other.start(nursery)
    address = await Server().start(nursery)
    assert await check(LlamaServerProbe("mine", "key"), Process()) == address
    nursery.cancel_scope.cancel()


async def test_a_wrapper_that_listens_nowhere_is_asked_at_the_address_of_its_group(nursery: trio.Nursery) -> None:
    address = await Server().start(nursery)
    with idle_process() as pid:
        assert await check(LlamaServerProbe("mine", "key"), Process(pid=pid, group=(os.getpid(),))) == address
    nursery.cancel_scope.cancel()


async def test_a_server_that_listens_elsewhere_than_on_the_loopback_is_not_asked(nursery: trio.Nursery) -> None:
    listeners = await nursery.start(partial(trio.serve_tcp, Server()._handle, 0, host="0.0.0.0"))
    port = listeners[0].socket.getsockname()[1]
    with pytest.raises(NotReady, match=rf"it listens at 0\.0\.0\.0:{port}, and not on 127\.0\.0\.1"):
        await check(LlamaServerProbe("mine", "key"), Process())
    nursery.cancel_scope.cancel()


async def test_a_child_that_does_not_let_us_look_is_not_ready_and_a_warning_says_why_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refused(_pids: object) -> list[Listener]:
        raise PermissionError(13, "Permission denied", "/proc/7/fd")

    monkeypatch.setattr("nodeagent.llama_server.probe.listeners_of", refused)
    probe = LlamaServerProbe("mine", "key")
    for _ in range(2):
        with pytest.raises(NotReady, match=r"can't be seen: .*Permission denied: '/proc/7/fd'"):
            await check(probe, Process())
    [warning] = caplog.messages
    assert warning.startswith("mine: where it listens can't be seen")


async def test_a_server_that_still_loads_is_not_ready(nursery: trio.Nursery) -> None:
    await Server(health=503).start(nursery)
    with pytest.raises(NotReady, match="/health returned 503"):
        await check(LlamaServerProbe("mine", "key"), Process())
    nursery.cancel_scope.cancel()


async def test_a_server_of_another_name_is_never_ready(nursery: trio.Nursery) -> None:
    await Server(name="other").start(nursery)
    with pytest.raises(NotReady, match="serves \\['other'\\], not 'mine'"):
        await check(LlamaServerProbe("mine", "key"), Process())
    nursery.cancel_scope.cancel()


async def test_a_server_that_does_not_answer_is_not_ready(nursery: trio.Nursery) -> None:
    await start_http_stub(nursery, lambda _request_line, _body: b"")
    with pytest.raises(NotReady, match="/health: closed the connection"):
        await check(LlamaServerProbe("mine", "key"), Process())
    nursery.cancel_scope.cancel()


async def test_the_name_is_asked_for_once_in_each_generation(nursery: trio.Nursery) -> None:
    server = Server()
    await server.start(nursery)
    probe = LlamaServerProbe("mine", "key")
    for generation in (1, 1, 2):
        await check(probe, Process(generation=generation))
    assert server.asked == ["/health", "/v1/models", "/health", "/health", "/v1/models"]
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("body", ["not JSON", "[]", '{"data": [{}]}', '{"data": null}'])
async def test_a_server_without_a_list_of_models_is_not_ready(body: str, nursery: trio.Nursery) -> None:
    await start_http_stub(nursery, lambda _request_line, _body: response(body))
    with pytest.raises(NotReady, match="/v1/models returned 200 and no list of models: unexpected JSON"):
        await check(LlamaServerProbe("mine", "key"), Process())
    nursery.cancel_scope.cancel()


def test_probes_that_ask_the_same_are_equal() -> None:
    probe = LlamaServerProbe("mine", "key")
    assert probe == LlamaServerProbe("mine", "key")
    assert hash(probe) == hash(LlamaServerProbe("mine", "key"))
    assert probe not in (LlamaServerProbe("other", "key"), LlamaServerProbe("mine", "another"), "mine")


class Slow(Server):
    """Takes a millisecond for each response, and accepts that clients leave."""

    async def _handle(self, stream: trio.SocketStream) -> None:
        await trio.sleep(0.001)
        try:
            await super()._handle(stream)
        except (trio.BrokenResourceError, IndexError):  # left before or after its request
            return


async def test_probes_that_are_cancelled_at_any_moment_do_not_block_the_next_ones(nursery: trio.Nursery) -> None:
    """A pool of httpx's that is cancelled while it is at its limit never lends a connection again (httpcore#1093)."""
    await Slow().start(nursery)
    process = Process()
    probe = LlamaServerProbe("mine", "key")

    async def cancelled(after_s: float) -> None:
        with trio.move_on_after(after_s):
            await check(probe, process)

    with trio.fail_after(30):
        for round_ in range(25):
            async with trio.open_nursery() as probes:
                for number in range(60):
                    probes.start_soon(cancelled, ((7 * round_ + number) % 60) * 0.0005)
        async with trio.open_nursery() as probes:
            for _ in range(20):
                probes.start_soon(check, probe, process)
    nursery.cancel_scope.cancel()
