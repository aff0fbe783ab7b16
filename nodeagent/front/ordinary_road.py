"""The road of ordinary requests, opened by the first of them: hypercorn and the application are imported only then.

They take a third of a second and 20 MiB. Inference and health checks need neither, so a node that serves nothing else
starts without them. The import runs in a thread: the requests in flight go on.
"""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import trio

from nodeagent.front.exchange import ASGIApp
from nodeagent.front.protocol import RequestHead
from nodeagent.front.response import ResponseWriter

if TYPE_CHECKING:
    from nodeagent.front.ordinary import OrdinaryLine, OrdinaryRequest

    Make = Callable[[RequestHead, OrdinaryLine, ResponseWriter, trio.Nursery], OrdinaryRequest]


_MODULE = "nodeagent.front.ordinary"


class OrdinaryRoad:
    """Makes the ordinary requests for an ASGI application. What changes: `_make`, once, in `request`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._opening = trio.Lock()
        self._make: Make | None = None

    async def request(
        self, head: RequestHead, line: "OrdinaryLine", response: ResponseWriter, nursery: trio.Nursery
    ) -> "OrdinaryRequest":
        """An ordinary request with this head, whose application runs in that nursery."""
        if self._make is None:
            async with self._opening:
                if _MODULE not in sys.modules:
                    await trio.to_thread.run_sync(import_module, _MODULE)
                self._make = _make_for(self._app)
        return self._make(head, line, response, nursery)


class LazyApp:
    """An ASGI application that is made with its first request, by a call of `make` in a thread."""

    def __init__(self, make: Callable[[], ASGIApp]) -> None:
        self._make = make
        self._making = trio.Lock()
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._making:
            if self._app is None:
                self._app = await trio.to_thread.run_sync(self._make)
        await self._app(scope, receive, send)


def _make_for(app: ASGIApp) -> "Make":
    from nodeagent.front.ordinary import OrdinaryRequest, settings

    return partial(OrdinaryRequest, app=app, config=settings())
