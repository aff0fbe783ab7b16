"""Requests for inference, from their connection to the relay without the web framework, and health checks.

What the application does for them on the ordinary road (ASGI, Quart: `asgi.py`, `origins.py`, `openai.py`) is done here
by the same functions, so both roads have the same answers; the tests of inference run on both.
"""

from contextlib import ExitStack

from nodeagent.errors import Refusal
from nodeagent.front import health, origins
from nodeagent.front.answer import Answer
from nodeagent.front.asgi import Front, answer_to
from nodeagent.front.endpoints import ENDPOINTS
from nodeagent.front.exchange import AbortResponse, Exchange, Handler
from nodeagent.front.half_close import HalfClose
from nodeagent.front.hosts import refuse_foreign_host
from nodeagent.front.inference import Inference
from nodeagent.front.openai import read_request
from nodeagent.front.paths import canonical
from nodeagent.front.refusals import refusal_response
from nodeagent.front.response import Headers
from nodeagent.front.seam import Node


class FastRoad:
    """Serves what is posted to the paths of inference, and health checks."""

    def __init__(self, node: Node, front: Front, inference: Inference) -> None:
        self._node = node
        self._front = front
        self._inference = inference
        self._paths = {path.encode("ascii"): path for path in ENDPOINTS}

    def find_handler(self, method: str, path: bytes) -> Handler | None:
        """The handler of requests for inference and of health checks, None for others; a path with escapes is one of
        those."""
        if method == "POST" and self._path(path) in ENDPOINTS:
            return self._serve
        return self._check_health if method in ("GET", "HEAD") and self._path(path) in health.PATHS else None

    def _path(self, path: bytes) -> str:
        """The path as the routes have it."""
        return self._paths.get(path) or canonical(path.decode("latin-1"))

    async def _check_health(self, exchange: Exchange) -> None:
        headers = dict(exchange.request.headers)
        identity, marks = self._front.identify(headers)
        page, site = _text(headers.get(b"origin")), _text(headers.get(b"sec-fetch-site"))
        marks += _encoded(origins.headers_for(self._node, page))
        try:
            refuse_foreign_host(self._node, _text(headers.get(b"host")), origin=page, fetch_site=site)
            query = exchange.request.target.partition(b"?")[2]
            status, fields, content = health.check(self._node, self._path(exchange.path), query)
        except Refusal as refusal:
            status, fields, content = refusal_response(refusal, identity)
        await _answer(exchange, status, fields, marks, content, close=False)

    async def _serve(self, exchange: Exchange) -> None:
        # The end of input is how most clients leave, and a generation costs much.
        exchange.line.on_half_close(HalfClose.GRACE)
        request = exchange.request
        headers = dict(request.headers)
        path = self._path(exchange.path)
        identity, marks = self._front.identify(headers)
        origin = headers.get(b"origin")
        page = _text(origin)
        marks += _encoded(origins.headers_for(self._node, page))
        body = self._front.body(headers, exchange.receive)
        error = None
        try:
            with ExitStack() as stack:
                stack.callback(body.release)
                body.admit()
                site = _text(headers.get(b"sec-fetch-site"))
                if page is not None or site is not None:
                    host = _text(headers.get(b"host"))
                    refuse_foreign_host(self._node, host, origin=page, fetch_site=site)
                    origins.refuse_foreign(self._node, request.method, path, page, host=host, fetch_site=site)
                content = exchange.whole_body()
                if content is None:
                    content = await body.read()
                else:
                    body.accept(content)
                valid = read_request(self._node, request_id=identity, path=path, headers=request.headers, body=content)
                await _relay(await self._inference.serve(valid, stack), exchange, marks, stack)
        except* AbortResponse:
            raise
        except* Exception as failures:
            error = answer_to(failures, request.method, path, identity, begun=exchange.response.started)
        if error is not None and not exchange.response.started:
            status, fields, content = error
            await _answer(exchange, status, fields, marks, content, close=not body.complete)


async def _relay(answer: Answer, exchange: Exchange, marks: Headers, stack: ExitStack) -> None:
    """Write the answer as it comes. The stack is closed before the client can have all of it, so that what the request
    held is free again by then."""
    body = answer.body
    chunk = await body.read()
    if body.at_end:
        stack.close()
    await exchange.start(answer.status, [*_encoded(answer.headers), *marks], chunk, more=not body.at_end)
    while not body.at_end:
        chunk = await body.read()
        if body.at_end:
            stack.close()
        await exchange.write(chunk, more=not body.at_end)


async def _answer(
    exchange: Exchange, status: int, fields: list[tuple[str, str]], marks: Headers, content: bytes, *, close: bool
) -> None:
    """Write a whole answer with these headers and the marks, which have the request's id already."""
    headers = [*_encoded([field for field in fields if field[0] != "x-request-id"]), *marks]
    headers.append((b"content-length", b"%d" % len(content)))
    if close:
        headers.append((b"connection", b"close"))
    await exchange.start(status, headers, content, more=False)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def _encoded(headers: list[tuple[str, str]]) -> Headers:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
