"""What a child can send when it is asked: each way to send too much, too slowly or nonsense, at each question."""

import os
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import cast

import pytest
import trio

from fakes.raw_server import OPEN, Handler, finish, read_request, serving
from nodeagent.errors import UpstreamLost
from nodeagent.llama_server.control import ControlError, Reply, ask
from nodeagent.llama_server.probe import LlamaServerProbe
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.slots import restore_slot, save_slot
from nodeagent.llama_server.stall_watch import Worker, observe
from supervisor.probe import NotReady, ProcessView

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
BLOCK = 64 * 1024


def answer(body: bytes) -> bytes:
    return LENGTH % len(body) + body


# What is sent once, and what is sent again and again after it.
FLOODS = {
    "body": (LENGTH % 2**40, b"x" * BLOCK),
    "chunks": (CHUNKED, b"%x\r\n" % BLOCK + b"x" * BLOCK + b"\r\n"),
    "small chunks": (CHUNKED, b"1\r\nx\r\n" * 1000),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"x-trailer: y\r\n" * 1000),
    "one trailer": (CHUNKED + b"2\r\n{}\r\n0\r\nx: ", b"y" * BLOCK),
    "chunk extension": (CHUNKED + b"2;", b"e" * BLOCK),
    "interim responses": (b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 1000),
    "headers": (b"HTTP/1.1 200 OK\r\n", b"x-header: y\r\n" * 1000),
    "one header": (b"HTTP/1.1 200 OK\r\nx: ", b"y" * BLOCK),
    "reason": (b"HTTP/1.1 200 ", b"y" * BLOCK),
}
NONSENSE = {
    "deep": answer(b"[" * 50_000 + b"]" * 50_000),
    "deep inside": answer(b'{"data": [{"id": ' + b'{"x":' * 9_000 + b"1" + b"}" * 9_000 + b"}]}"),
    "1e999": answer(b'{"data": 1e999, "n_saved": 1e999, "n_restored": 1e999}'),
    "a long number": answer(b'{"data": [], "n_saved": ' + b"9" * 60_000 + b', "n_restored": ' + b"9" * 60_000 + b"}"),
    "a lone surrogate": answer(b'{"\\ud800": 1}'),
    "not UTF-8": answer(b"\xff\xfe"),
    "no JSON": answer(b"\x1b[2J"),
    "empty": answer(b""),
    "no length": b"HTTP/1.1 200 OK\r\n\r\n{}",
    "no HTTP": b"\x00" * 100,
    "another protocol": b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nxxxx",
    "a wrong length": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n",
    "nothing": b"",
}


class ThisProcess:
    """The servers of these tests run in this process, so to the probe it is the child."""

    generation = 1
    pid = os.getpid()

    def group_pids(self) -> list[int]:
        return [self.pid]


async def probed(_upstream: Upstream) -> str:
    try:
        return await LlamaServerProbe("mine", "key").check(cast(ProcessView, ThisProcess()))
    except NotReady as error:
        return f"failed: {error}"


async def saved(upstream: Upstream) -> str:
    try:
        return str(await save_slot(upstream, 0, "file.kv"))
    except UpstreamLost as error:
        return f"failed: {error}"


async def restored(upstream: Upstream) -> str:
    try:
        return str(await restore_slot(upstream, 0, "file.kv"))
    except UpstreamLost as error:
        return f"failed: {error}"


async def observed(upstream: Upstream) -> str:
    worker = Worker(
        child_id="cpu:0/m", generation=1, pid=os.getpid(), upstream=upstream, stall_timeout_s=60, counts_cpu=False
    )
    counts = (await observe(worker, with_counts=True)).counts
    return "failed: no counts" if counts is None else str(counts)


Way = Callable[[Upstream], Awaitable[str]]
WAYS: dict[str, tuple[bytes, Way]] = {
    "/health": (b"GET /health ", probed),
    "/v1/models": (b"GET /v1/models ", probed),
    "/slots": (b"GET /slots ", observed),
    "save": (b"POST /slots/0?action=save ", saved),
    "restore": (b"POST /slots/0?action=restore ", restored),
}
each_way = pytest.mark.parametrize("way", WAYS)


def at(question: bytes, once: bytes, again: bytes = b"", *, pause_s: float = 0.0) -> Handler:
    """Answer this question so, and any other well; with `again`, the answer never ends."""

    async def handler(stream: trio.SocketStream) -> None:
        if not (await read_request(stream)).startswith(question):
            await stream.send_all(OK)
            return
        await stream.send_all(once)
        while again:
            await stream.send_all(again)
            await trio.sleep(pause_s)

    return handler


@contextmanager
def memory_below(max_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < max_bytes
    finally:
        tracemalloc.stop()


@each_way
@pytest.mark.parametrize("flood", FLOODS)
async def test_a_flood_ends_at_its_bound_with_a_reason(flood: str, way: str, nursery: trio.Nursery) -> None:
    question, act = WAYS[way]
    upstream = await serving(nursery, at(question, *FLOODS[flood]))
    with trio.fail_after(20), memory_below(16 * 2**20):
        outcome = await act(upstream)
    assert outcome == "failed: no counts" or "sent more than" in outcome or "invalid HTTP" in outcome
    finish(nursery)


@each_way
@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_nonsense_is_a_failed_reading_with_a_reason(nonsense: str, way: str, nursery: trio.Nursery) -> None:
    question, act = WAYS[way]
    upstream = await serving(nursery, at(question, NONSENSE[nonsense]))
    with trio.fail_after(20):
        outcome = await act(upstream)
    # Of `/health` only the status counts; a probe then goes on to the list of models, which is missing here.
    assert outcome.startswith("failed: ")
    assert outcome.isprintable()
    assert len(outcome) < 1000
    finish(nursery)


async def test_an_answer_that_comes_byte_by_byte_ends_at_the_deadline(nursery: trio.Nursery) -> None:
    outcomes = {}

    async def drip(way: str) -> None:
        question, act = WAYS[way]
        outcomes[way] = await act(await serving(nursery, at(question, LENGTH % 1000, b"x", pause_s=0.2)))

    with trio.fail_after(20):
        async with trio.open_nursery() as asking:
            for way in WAYS.keys() - {"/health", "/v1/models"}:
                asking.start_soon(drip, way)
    assert outcomes["/slots"] == "failed: no counts"
    assert "no complete answer within 10 s" in outcomes["save"]
    assert "no complete answer within 10 s" in outcomes["restore"]
    finish(nursery)


@pytest.mark.parametrize("way", ["/health", "/v1/models"])
async def test_a_probe_whose_answer_comes_byte_by_byte_ends_at_the_deadline(way: str, nursery: trio.Nursery) -> None:
    upstream = await serving(nursery, at(WAYS[way][0], LENGTH % 1000, b"x", pause_s=0.2))
    with trio.fail_after(20):
        assert await probed(upstream) == f"failed: {way}: no complete answer within 5 s"
    finish(nursery)


@pytest.mark.parametrize(
    ("sent", "body"),
    [
        (OK, b"{}"),
        (OK + b"and more", b"{}"),
        (OK + OK, b"{}"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + OK, b"{}"),
        (CHUNKED + b"1\r\n{\r\n1\r\n}\r\n0\r\nx: y\r\n\r\n", b"{}"),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}and more", b"{}"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
    ids=["plain", "more", "another", "interim responses", "trailer", "more after close", "no content"],
)
async def test_a_complete_answer_is_read_and_what_follows_it_dropped(
    sent: bytes, body: bytes, nursery: trio.Nursery
) -> None:
    upstream = await serving(nursery, at(b"GET /x ", sent))
    with trio.fail_after(5):
        reply = await ask(upstream.address, "key", "/x", timeout_s=5, max_bytes=1000)
    assert reply == Reply(int(sent.split()[1]) if b"100 Continue" not in sent else 200, body)
    finish(nursery)


async def test_the_bound_counts_everything_that_is_received(nursery: trio.Nursery) -> None:
    upstream = await serving(nursery, at(b"GET /x ", answer(b"x" * 1000)))
    size = len(answer(b"x" * 1000))
    with trio.fail_after(5):
        assert (await ask(upstream.address, "key", "/x", timeout_s=5, max_bytes=size)).status == 200
        with pytest.raises(ControlError, match=f"sent more than {size - 1} bytes"):
            await ask(upstream.address, "key", "/x", timeout_s=5, max_bytes=size - 1)
    finish(nursery)


async def test_a_server_that_is_gone_or_accepts_nothing_is_a_reason() -> None:
    assert not OPEN
    with trio.fail_after(5), pytest.raises(ControlError, match=r"the connection failed: .*refused"):
        await ask("127.0.0.1:1", "key", "/x", timeout_s=5, max_bytes=1000)
