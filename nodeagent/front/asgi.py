"""What each request gets before the application handles it: an id, what it holds, and limits on its body
(`body_budget.py`).

`Front` wraps the Quart-Trio application. It also answers the exceptions that the application raises: a refusal with its
status, anything else with a 500 that names the request's id.
"""

import logging
import os
import re
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any

import trio

from nodeagent.errors import Refusal
from nodeagent.front.body_budget import BodyBudget, Message, Receive, RequestBody
from nodeagent.front.error_shapes import dialect_of
from nodeagent.front.exchange import AbortResponse, ASGIApp
from nodeagent.front.half_close import HalfClose
from nodeagent.front.refusals import Headers, internal_error_response, refusal_response
from nodeagent.logs import request_id_var
from nodeagent.releases import Releases

logger = logging.getLogger(__name__)

Send = Callable[[Message], Awaitable[None]]

_CLIENTS_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}", re.ASCII)
_BODIES_HELD = 4

_releases: ContextVar[Releases] = ContextVar("releases")
_scope: ContextVar[Any] = ContextVar("scope")


def request_id() -> str:
    """Return the id of the request that this task serves, "" outside of one."""
    return request_id_var.get() or ""


def new_request_id() -> str:
    """An id for a request that has brought none."""
    return os.urandom(16).hex()


def releases() -> Releases:
    """Return what this request holds: its calls are made when the request ends, however it ends.

    They are made before the last bytes of the answer are sent, so that whatever the request held is free again once the
    client has its answer; if no answer gets that far, when the application returns. Callbacks are synchronous: neither
    a client that leaves nor a cancellation can lose one. Raises LookupError outside of a request.
    """
    return _releases.get()


def on_half_close(policy: HalfClose) -> None:
    """Set how long this request goes on after its client has closed its sending side; the default is `FINISH`.

    With `STREAM` the application should write something when `half_closed()` is set, within half a second: a client
    that has left answers with a reset. Raises LookupError outside of a request.
    """
    change = _scope.get().get("nodeagent.on_half_close")
    if change is not None:
        change(policy)


def half_closed() -> trio.Event:
    """Return the event that is set once this request's client has closed its sending side.

    Raises LookupError outside of a request.
    """
    event: trio.Event | None = _scope.get().get("nodeagent.half_closed")
    return trio.Event() if event is None else event


class Front:
    """The ASGI application that is served: `app`, without the requests that it can't handle.

    `body_budget_bytes` limits the request bodies held at once by all requests together. What has arrived of a body
    counts until its request ends. The default has room for four of the longest. Every answer carries `node_id` as
    `X-Node-Id`.
    """

    def __init__(
        self, app: ASGIApp, *, max_request_bytes: int, body_budget_bytes: int | None = None, node_id: str = ""
    ) -> None:
        self._app = app
        self._node_id = [(b"x-node-id", node_id.encode("ascii"))] if node_id else []
        self._max_request_bytes = max_request_bytes
        self._budget = BodyBudget(_BODIES_HELD * max_request_bytes if body_budget_bytes is None else body_budget_bytes)

    @property
    def body_bytes_held(self) -> int:
        """The bytes of request bodies that count against the budget now."""
        return self._budget.held

    def identify(self, headers: dict[bytes, bytes]) -> tuple[str, list[tuple[bytes, bytes]]]:
        """The id of the request that this task serves from now on, and the headers that every answer to it carries."""
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        identity = given if _CLIENTS_ID.fullmatch(given) else new_request_id()
        request_id_var.set(identity)
        return identity, [*self._node_id, (b"x-request-id", identity.encode("ascii"))]

    def body(self, headers: dict[bytes, bytes], receive: Receive) -> RequestBody:
        """The body of a request with these headers (lower case), within the limits."""
        return RequestBody(headers, receive, self._budget, self._max_request_bytes)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    async def _http(self, scope: Any, receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        identity, marks = self.identify(headers)
        body = self.body(headers, receive)
        answer = _ResponseSender(send, marks)
        error: tuple[int, Headers, bytes] | None = None
        try:
            with Releases() as held:
                _releases.set(held)
                _scope.set(scope)
                scope["nodeagent.request_id"] = identity
                scope["nodeagent.releases"] = held
                held.add(body.release)
                body.admit()
                answer.before_last = held.close
                await self._app(scope, body.receive, answer.send)
                if not answer.started and not body.disconnected:
                    raise RuntimeError("the application returned without an answer")
        except* AbortResponse:
            raise
        except* Exception as failures:
            error = answer_to(failures, scope["method"], scope["path"], identity, begun=answer.started)
        # An answer that has begun can only be truncated: the server closes uncleanly if it is incomplete.
        if error is not None and not answer.started:
            await answer.refuse(*error, close=not body.complete)


class _ResponseSender:
    """Sends the answer with our own headers (`marks`), and knows whether it has begun.

    `before_last` is called before the client can have the complete answer.
    """

    def __init__(self, send: Send, marks: list[tuple[bytes, bytes]]) -> None:
        self.started = False
        self.before_last: Callable[[], None] | None = None
        self._send = send
        self._marks = marks
        self._mark_names = {name for name, _value in marks}
        self._left_bytes: int | None = None

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            others = [header for header in message.get("headers", []) if header[0].lower() not in self._mark_names]
            self._left_bytes = _declared_bytes(others)
            message = {**message, "headers": [*others, *self._marks]}
        elif message["type"] == "http.response.body":
            if self._left_bytes is not None:
                self._left_bytes -= len(message.get("body", b""))
            if self.before_last is not None and (self._left_bytes == 0 or not message.get("more_body", False)):
                self.before_last()
        await self._send(message)

    async def refuse(self, status: int, headers: Headers, content: bytes, *, close: bool) -> None:
        """Answer with an error. `close` tells the client that the rest of its body won't be read."""
        head = [(name.encode("ascii"), value.encode("ascii")) for name, value in headers]
        head.append((b"content-length", b"%d" % len(content)))
        if close:
            head.append((b"connection", b"close"))
        await self.send({"type": "http.response.start", "status": status, "headers": head})
        await self.send({"type": "http.response.body", "body": content, "more_body": False})


def _declared_bytes(headers: list[tuple[bytes, bytes]]) -> int | None:
    lengths = [int(value) for name, value in headers if name.lower() == b"content-length"]
    return lengths[0] if lengths else None


def answer_to(
    failures: BaseExceptionGroup[Exception], method: str, path: str, identity: str, *, begun: bool
) -> tuple[int, Headers, bytes]:
    """The response to what was raised while a request was served: a refusal's, else a 500, logged with its traceback.

    `begun` is whether the answer has begun, so that this one can't be sent.
    """
    refusals, others = failures.split(Refusal)
    if refusals is None or others is not None:
        logger.error("%s %s failed (request %s)", method, path, identity, exc_info=_plainest(failures))
        return internal_error_response(identity, dialect_of(path))
    refusal = _first(refusals)
    if begun:
        logger.warning("request %s: answer truncated: %s", identity, refusal)
    return refusal_response(refusal, identity, dialect_of(path))


def refusals_in(failures: BaseExceptionGroup[Exception]) -> Iterator[Refusal]:
    """Every refusal in the group, however deep."""
    for failure in failures.exceptions:
        if isinstance(failure, BaseExceptionGroup):
            yield from refusals_in(failure)
        elif isinstance(failure, Refusal):
            yield failure


def _plainest(error: BaseException) -> BaseException:
    """The error without the exception groups in which nurseries wrap a single one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


def _first(group: BaseExceptionGroup[Refusal]) -> Refusal:
    found = group.exceptions[0]
    return _first(found) if isinstance(found, BaseExceptionGroup) else found
