"""HAProxy's agent check at real sockets, and with the real HAProxy."""

import csv
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import cast

import trio
from msgspec.structs import replace

from fakes.balanced_node import FakeLane, FakeNode
from nodeagent.front import agent_check
from nodeagent.front.seam import Node
from nodeagent.front.server import bind
from nodeagent.status import NodeState, NodeStatus

READY_LINE = b"ready up 50% maxconn:4\n"


@asynccontextmanager
async def answering(node: FakeNode) -> AsyncIterator[int]:
    """The agent check of that node, at the port that this gives."""
    listeners, port = await bind("127.0.0.1", 0)
    async with trio.open_nursery() as nursery:
        await nursery.start(agent_check.serve, cast(Node, node), listeners)
        yield port
        nursery.cancel_scope.cancel()


def node() -> FakeNode:
    return FakeNode(NodeStatus.READY, FakeLane(1, 1, 4))


async def everything_from(stream: trio.SocketStream) -> bytes:
    return b"".join([chunk async for chunk in stream])


async def test_each_connection_gets_one_line_and_its_end_whatever_it_sends() -> None:
    with trio.fail_after(10):
        async with answering(node()) as port:
            for greeting in (b"", b"hello\n", b"x" * 100_000):
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    if greeting:
                        await stream.send_all(greeting)
                    assert await everything_from(stream) == READY_LINE


async def test_clients_that_stay_are_closed_and_keep_nobody_from_an_answer() -> None:
    with trio.fail_after(10):
        async with answering(node()) as port:
            staying = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(100)]
            began = trio.current_time()
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                assert await everything_from(stream) == READY_LINE
            assert trio.current_time() - began < 0.5
            for stream in staying:
                assert await everything_from(stream) == READY_LINE
            await trio.sleep(1.2)
            for stream in staying:  # the other side is closed: it resets what comes now
                try:
                    await stream.send_all(b"still here")
                    await trio.sleep(0.005)
                    await stream.send_all(b"still here")
                except trio.BrokenResourceError:
                    await stream.aclose()
                    continue
                raise AssertionError("a client is still connected")


async def test_a_client_that_resets_its_connection_ends_no_other() -> None:
    with trio.fail_after(10):
        async with answering(node()) as port:
            for _ in range(20):
                stream = await trio.open_tcp_stream("127.0.0.1", port)
                stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                await trio.aclose_forcefully(stream)
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                assert await everything_from(stream) == READY_LINE


CONFIG = """
global
    stats socket {socket} level admin
defaults
    mode http
    timeout connect 1s
    timeout client 1s
    timeout server 1s
backend nodes
    balance leastconn
    server box 127.0.0.1:{port} weight 100 agent-check agent-port {port} agent-inter 30ms
"""


@asynccontextmanager
async def haproxy(folder: Path, port: int) -> AsyncIterator[Path]:
    """A running HAProxy with that agent check; gives its socket for commands."""
    program = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert program is not None, "haproxy is missing: install its package"
    file, socket = folder / "haproxy.cfg", folder / "haproxy.socket"
    file.write_text(CONFIG.format(socket=socket, port=port), encoding="utf-8")
    async with trio.open_nursery() as nursery:
        command = [program, "-db", "-f", str(file)]
        process = await nursery.start(partial(trio.run_process, command, check=False, capture_stderr=True))
        while not socket.exists():
            assert process.poll() is None, "HAProxy ended"
            await trio.sleep(0.01)
        yield socket
        process.kill()


async def row_of_server(socket: Path) -> dict[str, str]:
    """What HAProxy knows of the server, by the names of its statistics."""
    async with await trio.open_unix_socket(str(socket)) as stream:
        await stream.send_all(b"show stat\n")
        text = (await everything_from(stream)).decode().removeprefix("# ")
    [row] = [row for row in csv.DictReader(text.splitlines()) if row["svname"] == "box"]
    return row


async def until_haproxy_has(socket: Path, **wanted: str) -> dict[str, str]:
    while True:
        row = await row_of_server(socket)
        if {name: row[name] for name in wanted} == wanted:
            return row
        await trio.sleep(0.02)


async def test_the_real_haproxy_follows_the_node(tmp_path: Path) -> None:
    box = node()
    with trio.fail_after(20):
        async with answering(box) as port, haproxy(tmp_path, port) as socket:
            row = await until_haproxy_has(socket, status="no check", weight="50", slim="4")
            assert row["agent_status"].removeprefix("* ") == "L7OK", "with a star while the next check runs"
            box.device_lanes = [FakeLane(4, 0, 4), FakeLane(0, 0, 6)]
            await until_haproxy_has(socket, status="no check", weight="60", slim="10")
            serving = box.now
            box.now = replace(serving, status=NodeStatus.DRAINING)
            await until_haproxy_has(socket, status="DRAIN (agent)")
            box.now = serving
            await until_haproxy_has(socket, status="no check", weight="60")
            box.now = NodeState(NodeStatus.DEGRADED, ("a on gpu:0: exited",), can_serve=False)
            row = await until_haproxy_has(socket, status="DOWN (agent)")
            assert row["last_agt"] == "via agent : down (a on gpu:0: exited)"
            box.now = serving
            await until_haproxy_has(socket, status="no check")
