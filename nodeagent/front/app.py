"""The Quart-Trio application: its routes, its settings, and the responses to its errors."""

from typing import Any

from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge

from nodeagent.errors import BodyTooLarge, Refusal
from nodeagent.front import (
    controls,
    guard,
    health,
    metrics,
    models,
    node,
    ollama_models,
    openai,
    openapi,
    origins,
    web_page,
)
from nodeagent.front.asgi import request_id
from nodeagent.front.endpoints import ENDPOINTS
from nodeagent.front.error_shapes import dialect_of
from nodeagent.front.inference import Inference
from nodeagent.front.paths import canonical
from nodeagent.front.refusals import echo, error_response, refusal_response
from nodeagent.front.seam import Node
from nodeagent.front.server_figures import ServerFigures
from nodeagent.front.window import Window

_WHERE = (
    "OpenAI's API is under /v1/ (/v1/models, /v1/chat/completions, /v1/embeddings, ...), the node's own under "
    "/v1/node/, and health checks are /livez, /readyz and /health."
)


def create_app(of: Node, inference: Inference | None = None) -> QuartTrio:
    """Build the application that serves this node. `inference` is shared with the fast road, where there is one."""
    app = _App(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = of.max_request_bytes
    # `Front` limits how long a body may take. Quart's own default ends any response after 60 s, streams too.
    app.config["BODY_TIMEOUT"] = None
    app.config["RESPONSE_TIMEOUT"] = None
    # `Front` answers and logs unexpected exceptions, with the request's id.
    app.config["PROPAGATE_EXCEPTIONS"] = True
    app.json.sort_keys = False  # type: ignore[attr-defined]
    inference = inference or Inference(of.scheduler)
    slots = Window("/slots")  # one for all: each look costs the server something
    figures = ServerFigures(of.scheduler, inference.tallies, slots, Window("/metrics"))
    for routes in (
        openai.blueprint(of, inference),
        models.blueprint(of, slots),
        controls.blueprint(of),
        ollama_models.blueprint(of),
        metrics.blueprint(of, inference.tallies, figures),
        node.blueprint(of, inference),
        health.blueprint(of),
        web_page.blueprint(of),
    ):
        app.register_blueprint(routes)
    origins.guard(app, of)
    guard.guard(app, of)

    @app.get("/openapi.json")
    async def describe() -> dict[str, Any]:
        return openapi.document(app.url_map)

    @app.errorhandler(Refusal)
    async def refuse(refusal: Refusal) -> Response:
        if request.method == "POST" and request.path in ENDPOINTS:
            inference.tallies.refused_early(request.path, request_id(), request.scope["headers"], refusal)
        return _response(*refusal_response(refusal, request_id(), dialect_of(request.path)))

    @app.errorhandler(RequestEntityTooLarge)
    async def too_large(_error: RequestEntityTooLarge) -> Response:
        return await refuse(BodyTooLarge(of.max_request_bytes))

    @app.errorhandler(NotFound)
    async def not_found(_error: NotFound) -> Response:
        return _http_error(404, f"{request.method} {echo(request.path)}: there is no such path. {_WHERE}")

    @app.errorhandler(MethodNotAllowed)
    async def method_not_allowed(error: MethodNotAllowed) -> Response:
        allowed = ", ".join(sorted(error.valid_methods or ()))
        response = _http_error(
            405, f"{request.method} is not allowed on {echo(request.path)}, only: {allowed}. {_WHERE}"
        )
        response.headers["Allow"] = allowed  # required by RFC 9110, 15.5.6
        return response

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        return _http_error(error.code or 500, error.description or error.name)

    return app


class _App(QuartTrio):
    """Serves a path however it is spelt, and answers OPTIONS without content."""

    async def asgi_app(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            scope = {**scope, "path": canonical(scope["path"])}
        await super().asgi_app(scope, receive, send)

    async def make_default_options_response(self, *context: Any) -> Response:
        """The response to OPTIONS on a path that exists. From 0.23 on, Quart gives it the request's context."""
        response = await super().make_default_options_response(*context)
        response.status_code = 204
        for name in ("Content-Length", "Content-Type"):  # RFC 9110, 8.6: never a length with 204
            response.headers.pop(name, None)
        response.headers["Allow"] = ", ".join(sorted(response.headers["Allow"].split(", ")))
        return response


def _http_error(status: int, message: str) -> Response:
    return _response(*error_response(status, message, request_id(), dialect_of(request.path)))


def _response(status: int, headers: list[tuple[str, str]], body: bytes) -> Response:
    return Response(body, status=status, headers=Headers(headers))
