"""Streams that take hours, in virtual time: the front with its default time-outs, a real relay, the watch for stalls.

Only the sockets have no addresses.
"""

from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from fakes.one_model_node import OneModelNode, chat
from fakes.pair_serving import PairListener, PairServers, PairUpstream
from fakes.raw_server import read_request
from nodeagent.front.server import serve
from nodeagent.llama_server.stall_watch import Observation, Worker, watch

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
HOUR_S = 3600.0


class Slow:
    """A server that sends so many events, one each `every_s`."""

    def __init__(self, events: int, every_s: float) -> None:
        self._events = events
        self._every_s = every_s

    async def __call__(self, stream: trio.SocketStream) -> None:
        await read_request(stream)
        await stream.send_all(STREAM)
        for number in range(self._events):
            await trio.sleep(self._every_s)
            await stream.send_all(chunk(b"data: %d\n\n" % number))
        await stream.send_all(chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        await stream.receive_some()  # until the relay closes its idle connection


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


async def observe(worker: Worker, *, with_counts: bool) -> Observation:
    """See nothing of the server but its answers."""
    upstream = worker.upstream
    return Observation(at=trio.current_time(), in_flight=upstream.in_flight, bytes_received=upstream.bytes_received)


@pytest.mark.parametrize("road", ["fast", "ordinary"])
@pytest.mark.parametrize(
    ("every_s", "stall_timeout_s"), [(5.0, 120.0), (600.0, HOUR_S)], ids=["steady", "with long silences"]
)
async def test_no_time_out_ends_a_stream_that_goes_on_for_hours(
    road: str, every_s: float, stall_timeout_s: float, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    events = int(2 * HOUR_S / every_s)
    upstream = PairUpstream(nursery, Slow(events, every_s))
    node = OneModelNode(PairServers(nursery, upstream), road=road)
    await node.start(nursery)
    worker = Worker(
        child_id="cpu:0/a", generation=1, pid=1, upstream=upstream, stall_timeout_s=stall_timeout_s, counts_cpu=False
    )
    stalled: list[str] = []

    def fail(_child_id: str, _generation: int, reason: str) -> None:
        stalled.append(reason)

    async def watch_it() -> None:
        await watch(lambda: [worker], fail, observe=observe)

    nursery.start_soon(watch_it, name="watch")
    listener = PairListener()

    async def run(task_status: trio.TaskStatus[None]) -> None:
        shutdown = trio.Event()
        await serve(node.front, [cast(Any, listener)], shutdown=shutdown, task_status=task_status, **node.options)

    await nursery.start(run, name="serve")
    began = trio.current_time()
    async with listener.connect() as client:
        await client.send(chat())
        answer = await client.rest()
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"data: ") == events + 1
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert trio.current_time() - began == pytest.approx(2 * HOUR_S)
    assert stalled == []
    assert node.held() == (0, 0, 0)
    upstream.close()
    nursery.cancel_scope.cancel()
