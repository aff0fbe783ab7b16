"""Our server with TLS, both versions of HTTP and the fast road, and handlers that behave in one way each."""

from typing import Any

import trio

from fakes.http2_client import server_context
from fakes.serving import Served, quart_app, start_serving
from nodeagent.front.asgi import Front
from nodeagent.front.exchange import Exchange, Handler
from nodeagent.front.server import ASGIApp

LONG = b"x" * 3_000_000


async def serving(nursery: trio.Nursery, app: ASGIApp | None = None, **options: Any) -> Served:
    context = server_context()
    front = app or Front(quart_app(), max_request_bytes=2**20)
    return await start_serving(nursery, front, **{"find_tls": lambda: context, **options})


def all_by(handler: Handler) -> Any:
    """Every request takes the fast road."""
    return lambda _method, _path: handler


async def count_body(exchange: Exchange) -> None:
    size, more = 0, True
    while more:
        message = await exchange.receive()
        size, more = size + len(message["body"]), message["more_body"]
    await exchange.start(200, [], b"%d" % size, more=False)


async def long_answer(exchange: Exchange) -> None:
    await exchange.start(200, [(b"content-length", b"%d" % len(LONG))], LONG, more=False)


class HeldExchange:
    """Writes its first bytes, then waits; `left` is set when it is cancelled."""

    def __init__(self) -> None:
        self.left = trio.Event()
        self.finish = trio.Event()

    async def __call__(self, exchange: Exchange) -> None:
        try:
            await exchange.start(200, [], b"first", more=True)
            await self.finish.wait()
            await exchange.write(b"last", more=False)
        except trio.Cancelled:
            self.left.set()
            raise
