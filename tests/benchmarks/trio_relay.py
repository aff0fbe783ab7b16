#!/usr/bin/env python3
"""A relay that copies bytes and does nothing else: what two sockets and trio's tasks cost by themselves.

    python tests/benchmarks/trio_relay.py PORT UPSTREAM_PORT

Each client gets a connection of its own to the upstream server, and each direction a task: one read and one write for
whatever has arrived. What the agent takes beyond this is HTTP, scheduling and its figures.
"""

import os
import sys
from contextlib import suppress

import trio

_READ_BYTES = 2**16


async def main() -> None:
    port, upstream_port = map(int, sys.argv[1:])

    async def relay(client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", upstream_port)
        async with server, trio.open_nursery() as nursery:
            nursery.start_soon(copy, client.socket, server.socket, nursery.cancel_scope)
            nursery.start_soon(copy, server.socket, client.socket, nursery.cancel_scope)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        await trio.serve_listeners(relay, listeners, handler_nursery=nursery)


async def copy(source: trio.socket.SocketType, target: trio.socket.SocketType, both: trio.CancelScope) -> None:
    """Pass on what arrives until one side is gone, then end both directions."""
    with suppress(OSError, trio.ClosedResourceError):
        while True:
            await trio.lowlevel.wait_readable(source)
            data = os.read(source.fileno(), _READ_BYTES)
            if not data:
                break
            await write(target, data)
    both.cancel()


async def write(target: trio.socket.SocketType, data: bytes) -> None:
    """Write it at once if the socket's buffer has room. Raises OSError."""
    written = 0
    while True:
        with suppress(BlockingIOError):
            written += os.write(target.fileno(), data[written:])
        if written == len(data):
            return
        await trio.lowlevel.wait_writable(target)


if __name__ == "__main__":
    trio.run(main)
