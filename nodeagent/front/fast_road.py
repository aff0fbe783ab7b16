"""Requests for inference, from their connection to the relay without the web framework.

What the application does for them on the ordinary road (ASGI, Quart: `asgi.py`, `origins.py`, `openai.py`) is done here
by the same functions, so both roads have the same answers; the tests of inference run on both.
"""

from contextlib import ExitStack

from nodeagent.front import origins
from nodeagent.front.asgi import Front, answer_to
from nodeagent.front.exchange import Exchange, Handler
from nodeagent.front.half_close import HalfClose
from nodeagent.front.inference import Answer, Inference
from nodeagent.front.openai import INFERENCE_PATHS, read_request
from nodeagent.front.ordinary import AbortResponse
from nodeagent.front.response import Headers
from nodeagent.front.seam import Node


class FastRoad:
    """Serves what is posted to the paths of inference."""

    def __init__(self, node: Node, front: Front, inference: Inference) -> None:
        self._node = node
        self._front = front
        self._inference = inference
        self._paths = {path.encode("ascii"): path for path in INFERENCE_PATHS}

    def find_handler(self, method: str, path: bytes) -> Handler | None:
        """The handler of requests for inference, None for others; a path that is written otherwise is one of those."""
        return self._serve if method == "POST" and path in self._paths else None

    async def _serve(self, exchange: Exchange) -> None:
        # The end of input is how most clients leave, and a generation costs much.
        exchange.line.on_half_close(HalfClose.GRACE)
        request = exchange.request
        headers = dict(request.headers)
        path = self._paths[exchange.path]
        identity, marks = self._front.identify(headers)
        origin = headers.get(b"origin")
        page = None if origin is None else origin.decode("latin-1")
        marks += _encoded(origins.headers_for(self._node, page))
        body = self._front.body(headers, exchange.receive)
        error = None
        try:
            with ExitStack() as stack:
                stack.callback(body.release)
                body.admit()
                origins.refuse_foreign(self._node, request.method, path, page)
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
            fields = [field for field in fields if field[0] != "x-request-id"]
            await _refuse(exchange, status, [*_encoded(fields), *marks], content, close=not body.complete)


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


async def _refuse(exchange: Exchange, status: int, headers: Headers, content: bytes, *, close: bool) -> None:
    headers.append((b"content-length", b"%d" % len(content)))
    if close:
        headers.append((b"connection", b"close"))
    await exchange.start(status, headers, content, more=False)


def _encoded(headers: list[tuple[str, str]]) -> Headers:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers]
