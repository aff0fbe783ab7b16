"""The Quart-Trio application: its routes, its settings, and how its errors are answered."""

from quart import Response
from quart_trio import QuartTrio
from werkzeug.datastructures import Headers
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from nodeagent.errors import BodyTooLarge, Refusal
from nodeagent.front import health, node, openai
from nodeagent.front.asgi import request_id
from nodeagent.front.refusals import error_response, refusal_response
from nodeagent.front.seam import Node


def create_app(of: Node) -> QuartTrio:
    """Build the application that serves this node."""
    app = QuartTrio(__name__, static_folder=None)
    app.config["MAX_CONTENT_LENGTH"] = of.max_request_bytes
    # The wrapper around the app bounds bodies in time; Quart by itself cuts any answer, streams too, after 60 s.
    app.config["BODY_TIMEOUT"] = None
    app.config["RESPONSE_TIMEOUT"] = None
    # Faults of ours go to the wrapper, which answers and logs them with the request's id.
    app.config["PROPAGATE_EXCEPTIONS"] = True
    app.json.sort_keys = False  # type: ignore[attr-defined]
    for room in (openai, node, health):
        app.register_blueprint(room.blueprint(of))

    @app.errorhandler(Refusal)
    async def refuse(refusal: Refusal) -> Response:
        return _response(*refusal_response(refusal, request_id()))

    @app.errorhandler(RequestEntityTooLarge)
    async def too_large(_error: RequestEntityTooLarge) -> Response:
        return await refuse(BodyTooLarge(of.max_request_bytes))

    @app.errorhandler(HTTPException)
    async def http_error(error: HTTPException) -> Response:
        return _response(*error_response(error.code or 500, error.description or error.name, request_id()))

    return app


def _response(status: int, headers: list[tuple[str, str]], body: bytes) -> Response:
    return Response(body, status=status, headers=Headers(headers))
