"""Readiness: the child's own address, its health, its alias."""

import json
from functools import partial
from typing import cast

import pytest
import trio

from fakes.http_stub import response, start_http_stub
from nodeagent.llama_server.probe import LlamaServerProbe
from supervisor.output import Output
from supervisor.probe import NotReady, ProcessView


class Printed:
    """A process of which the probe sees the output and the generation."""

    def __init__(self, *lines: str, generation: int = 1) -> None:
        self.generation = generation
        self.output = Output(lambda _line: None)
        self.output.feed("".join(f"{line}\n" for line in lines).encode())


class Server:
    """Answers `/health` with a status, and `/v1/models` with a name."""

    def __init__(self, *, health: int = 200, name: str = "mine") -> None:
        self.health = health
        self.name = name
        self.asked: list[str] = []

    async def start(self, nursery: trio.Nursery) -> str:
        listeners = await nursery.start(partial(trio.serve_tcp, self._handle, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        return f"0.00.011 I srv  llama_server: listening on http://127.0.0.1:{port}"

    async def _handle(self, stream: trio.SocketStream) -> None:
        async with stream:
            request = (await stream.receive_some(65536)).decode()
            path = request.split(" ")[1]
            self.asked.append(path)
            assert "authorization: Bearer key" in request or "Authorization: Bearer key" in request
            names = json.dumps({"data": [{"id": self.name}]})
            status, body = (self.health, "{}") if path == "/health" else (200, names)
            await stream.send_all(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())


async def check(probe: LlamaServerProbe, process: Printed) -> str:
    with trio.fail_after(5):
        return await probe.check(cast(ProcessView, process))


async def test_a_server_that_is_healthy_and_has_our_name_is_ready_at_the_address_it_printed(
    nursery: trio.Nursery,
) -> None:
    server = Server()
    line = await server.start(nursery)
    assert await check(LlamaServerProbe("mine", "key"), Printed("loading", line)) == line.rpartition("//")[2]
    nursery.cancel_scope.cancel()


async def test_nothing_is_asked_before_the_child_has_printed_its_address() -> None:
    with pytest.raises(NotReady, match="not printed its address"):
        await check(LlamaServerProbe("mine", "key"), Printed("loading model"))


async def test_a_server_that_still_loads_is_not_ready(nursery: trio.Nursery) -> None:
    process = Printed(await Server(health=503).start(nursery))
    with pytest.raises(NotReady, match="/health returned 503"):
        await check(LlamaServerProbe("mine", "key"), process)
    nursery.cancel_scope.cancel()


async def test_a_server_of_another_name_is_never_ready(nursery: trio.Nursery) -> None:
    process = Printed(await Server(name="other").start(nursery))
    with pytest.raises(NotReady, match="serves \\['other'\\], not 'mine'"):
        await check(LlamaServerProbe("mine", "key"), process)
    nursery.cancel_scope.cancel()


async def test_a_server_that_does_not_answer_is_not_ready() -> None:
    with pytest.raises(NotReady, match="/health failed"):
        await check(LlamaServerProbe("mine", "key"), Printed("listening on http://127.0.0.1:1"))


async def test_the_name_is_asked_for_once_in_each_generation(nursery: trio.Nursery) -> None:
    server = Server()
    line = await server.start(nursery)
    probe = LlamaServerProbe("mine", "key")
    for generation in (1, 1, 2):
        await check(probe, Printed(line, generation=generation))
    assert server.asked == ["/health", "/v1/models", "/health", "/health", "/v1/models"]
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("body", ["not JSON", "[]", '{"data": [{}]}', '{"data": null}'])
async def test_a_server_without_a_list_of_models_is_not_ready(body: str, nursery: trio.Nursery) -> None:
    address = await start_http_stub(nursery, lambda _request_line, _body: response(body))
    with pytest.raises(NotReady, match="/v1/models returned 200 and no list of models"):
        await check(LlamaServerProbe("mine", "key"), Printed(f"listening on http://{address}"))
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
    process = Printed(await Slow().start(nursery))
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
