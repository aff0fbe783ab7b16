"""The Quart-Trio application: its routes, its settings, and the responses to its errors."""

from quart import Response, request
from quart_trio import QuartTrio
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound, RequestEntityTooLarge

from nodeagent.errors import BodyTooLarge, Refusal
from nodeagent.front import health, node, openai, origins
from nodeagent.front.asgi import request_id
from nodeagent.front.inference import Inference
from nodeagent.front.refusals import echo, error_response, refusal_response
from nodeagent.front.seam import Node

_WHERE = (
    "OpenAI's API is under /v1/ (/v1/models, /v1/chat/completions, /v1/completions), the node's own under /v1/node/, "
    "and health checks are /livez, /readyz and /health."
)


def create_app(of: Node, inference: Inference | None = None) -> QuartTrio:
    """Build the application that serves this node. `inference` is shared with the fast road, where there is one."""
    app = QuartTrio(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = of.max_request_bytes
    # `Front` limits how long a body may take. Quart's own default ends any response after 60 s, streams too.
    app.config["BODY_TIMEOUT"] = None
    app.config["RESPONSE_TIMEOUT"] = None
    # `Front` answers and logs unexpected exceptions, with the request's id.
    app.config["PROPAGATE_EXCEPTIONS"] = True
    app.json.sort_keys = False  # type: ignore[attr-defined]
    for routes in (
        openai.blueprint(of, inference or Inference(of.scheduler)),
        node.blueprint(of),
        health.blueprint(of),
    ):
        app.register_blueprint(routes)
    origins.guard(app, of)

    @app.errorhandler(Refusal)
    async def refuse(refusal: Refusal) -> Response:
        return _response(*refusal_response(refusal, request_id()))

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


def _http_error(status: int, message: str) -> Response:
    return _response(*error_response(status, message, request_id()))


def _response(status: int, headers: list[tuple[str, str]], body: bytes) -> Response:
    return Response(body, status=status, headers=Headers(headers))
