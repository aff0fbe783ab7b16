"""Requests for inference, from their connection to the relay without the web framework, and those that only read and
come again and again: health checks, the inventory and the queue.

What the application does for them on the ordinary road (ASGI, Quart: `asgi.py`, `origins.py`, `openai.py`) is done here
by the same functions, so both roads have the same answers; the tests of inference run on both.
"""

from functools import partial

from nodeagent.front import health, looks, origins
from nodeagent.front.answer import Answer
from nodeagent.front.asgi import Front, answer_to, refusals_in
from nodeagent.front.endpoints import ENDPOINTS
from nodeagent.front.exchange import AbortResponse, Exchange, Handler
from nodeagent.front.guard import enter, given_key
from nodeagent.front.half_close import HalfClose
from nodeagent.front.header_text import as_bytes, text_of
from nodeagent.front.hosts import refuse_foreign_host
from nodeagent.front.inference import Inference
from nodeagent.front.openai import read_request
from nodeagent.front.paths import canonical
from nodeagent.front.request_body import model_at_start
from nodeagent.front.response import Headers
from nodeagent.front.seam import Node, find_card
from nodeagent.releases import Releases

_READ = frozenset({*health.PATHS, *looks.PATHS})
_JSON = [("content-type", "application/json")]


class FastRoad:
    """Serves what is posted to the paths of inference, health checks, and looks at the node."""

    def __init__(self, node: Node, front: Front, inference: Inference) -> None:
        self._node = node
        self._front = front
        self._inference = inference
        self._paths = {path.encode("ascii"): path for path in ENDPOINTS}

    def find_handler(self, method: str, path: bytes) -> Handler | None:
        """The handler of the requests that are served here, None for others; a path with escapes is one of those."""
        if method == "POST" and self._path(path) in ENDPOINTS:
            return self._serve
        return self._read if method in ("GET", "HEAD") and self._path(path) in _READ else None

    def _path(self, path: bytes) -> str:
        """The path as the routes have it."""
        return self._paths.get(path) or canonical(path.decode("latin-1"))

    async def _read(self, exchange: Exchange) -> None:
        """Answer a request that only reads: a health check, or a look at the node."""
        request = exchange.request
        headers = request.values
        path = self._path(exchange.path)
        identity, marks = self._front.identify(headers)
        origin, host, site = (text_of(headers.get(name)) for name in (b"origin", b"host", b"sec-fetch-site"))
        if path in health.PATHS:
            marks += as_bytes(origins.headers_for(self._node, origin))
        try:
            refuse_foreign_host(self._node, host, origin=origin, fetch_site=site)
            if path in health.PATHS:
                status, fields, content = health.check(self._node, path, request.target.partition(b"?")[2])
            else:
                enter(self._node, request.method, path, given_key(headers), Releases())  # it holds nothing
                status, fields, content = 200, _JSON, looks.look(self._node, path, headers)
        except Exception as failure:
            failures = ExceptionGroup("", [failure])
            status, fields, content = answer_to(failures, request.method, path, identity, begun=False)
        await _answer(exchange, status, fields, marks, content, close=False)

    async def _serve(self, exchange: Exchange) -> None:
        # The end of input is how most clients leave, and a generation costs much.
        exchange.line.on_half_close(HalfClose.GRACE)
        request = exchange.request
        headers = request.values
        path = self._path(exchange.path)
        identity, marks = self._front.identify(headers)
        origin = headers.get(b"origin")
        page = text_of(origin)
        marks += as_bytes(origins.headers_for(self._node, page))
        body = self._front.body(headers, exchange.receive)
        error = None
        try:
            with Releases() as held:
                held.add(body.release)
                body.admit()
                site = text_of(headers.get(b"sec-fetch-site"))
                if page is not None or site is not None:
                    host = text_of(headers.get(b"host"))
                    refuse_foreign_host(self._node, host, origin=page, fetch_site=site)
                    origins.refuse_foreign(self._node, request.method, path, page, host=host, fetch_site=site)
                enter(self._node, request.method, path, given_key(headers), held)
                content = exchange.whole_body()
                if content is None:
                    content = await body.read(partial(_refuse_unknown_model, self._node, path))
                else:
                    body.accept(content)
                valid = read_request(self._node, request_id=identity, path=path, headers=request.headers, body=content)
                await _relay(await self._inference.serve(valid, held), exchange, marks, held)
        except* AbortResponse:
            raise
        except* Exception as failures:
            self._note_refusals(failures, path, identity, request.headers)
            error = answer_to(failures, request.method, path, identity, begun=exchange.response.started)
        if error is not None and not exchange.response.started:
            status, fields, content = error
            await _answer(exchange, status, fields, marks, content, close=not body.complete)

    def _note_refusals(
        self, failures: BaseExceptionGroup[Exception], path: str, identity: str, headers: Headers
    ) -> None:
        """Note them in the activity. No variable of `_serve` may refer to one: the request's body, which its traceback
        refers to, would stay until the garbage collector finds both."""
        for refusal in refusals_in(failures):
            self._inference.tallies.refused_early(path, identity, headers, refusal)


def _refuse_unknown_model(node: Node, path: str, beginning: bytes) -> None:
    """Refuse a request for a model that is not here, or not for its key, before the rest of its body has come. Raises
    ModelNotFound and ModelForbidden."""
    named = None if ENDPOINTS[path].is_form else model_at_start(beginning)
    if named is not None:
        find_card(node, named)


async def _relay(answer: Answer, exchange: Exchange, marks: Headers, held: Releases) -> None:
    """Write the answer as it comes. `held` is closed before the client can have all of it, so that what the request
    held is free again by then."""
    body = answer.body
    chunk = await body.read()
    if body.at_end:
        held.close()
    await exchange.start(answer.status, [*answer.headers, *marks], chunk, more=not body.at_end)
    while not body.at_end:
        chunk = await body.read()
        if body.at_end:
            held.close()
        await exchange.write(chunk, more=not body.at_end)


async def _answer(
    exchange: Exchange, status: int, fields: list[tuple[str, str]], marks: Headers, content: bytes, *, close: bool
) -> None:
    """Write a whole answer with these headers and the marks, which have the request's id already."""
    headers = [*as_bytes([field for field in fields if field[0] != "x-request-id"]), *marks]
    headers.append((b"content-length", b"%d" % len(content)))
    if close:
        headers.append((b"connection", b"close"))
    await exchange.start(status, headers, content, more=False)
