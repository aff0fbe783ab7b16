"""The routes of OpenAI's API, and the validation of their bodies. `inference.py` serves what is valid.

A body is forwarded unchanged; `request_body.py` reads what decides where it goes.
"""

from collections.abc import Iterable
from typing import Any, Final

from quart import Blueprint, Response, request
from werkzeug.datastructures import Headers

from nodeagent.errors import InvalidRequest
from nodeagent.front.asgi import exit_stack, on_half_close, request_id
from nodeagent.front.half_close import HalfClose
from nodeagent.front.inference import Inference, InferenceRequest
from nodeagent.front.request_body import BodyFields, read_body, without_bom
from nodeagent.front.seam import ModelCard, Node, find_card
from nodeagent.llama_server.headers import forwardable
from nodeagent.scheduling.queueing import Priority

# The paths of inference, and the field that the body of each must have.
INFERENCE_PATHS: Final = {
    "/v1/chat/completions": "messages",
    "/v1/completions": "prompt",
}


def blueprint(node: Node, inference: Inference) -> Blueprint:
    """The routes under `/v1` that OpenAI's clients use."""
    routes = Blueprint("openai", __name__)

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_card_json(card) for card in node.cards()]}

    @routes.get("/v1/models/<path:model>")
    async def show_model(model: str) -> dict[str, Any]:
        return _card_json(find_card(node, model))

    async def infer() -> Response:
        # The end of input is how most clients leave, and a generation costs much.
        on_half_close(HalfClose.GRACE)
        body = await request.get_data(cache=False)
        assert isinstance(body, bytes)
        headers = [(name.lower(), value) for name, value in request.scope["headers"]]
        valid = read_request(node, request_id=request_id(), path=request.path, headers=headers, body=body)
        answer = await inference.serve(valid, exit_stack())
        return Response(answer.body, status=answer.status, headers=Headers(answer.headers))

    for path in INFERENCE_PATHS:
        routes.post(path, endpoint=path.replace("/", "_"))(infer)
    return routes


def read_request(
    node: Node, *, request_id: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes
) -> InferenceRequest:
    """Check a request for inference; the names of `headers` are lower case. Raises InvalidRequest and ModelNotFound."""
    needs = INFERENCE_PATHS[path]
    body = without_bom(body)
    values = dict(headers)
    fields = read_body(body, needs=needs)
    # On one device there is nothing to choose, so its requests need not be told apart.
    several = len(node.scheduler.lanes) > 1
    return InferenceRequest(
        request_id=request_id,
        model_id=find_card(node, model_of(node, fields)).model_id,
        priority=read_priority(_text(values.get(b"x-priority"))),
        conversation=conversation_of(_text(values.get(b"x-session-id")), fields) if several else None,
        slots=fields.completions,
        path=path,
        headers=headers_of_json(headers),
        body=body,
    )


def model_of(node: Node, fields: BodyFields) -> str:
    """The model that the request names, else the node's default. Raises InvalidRequest if there is none."""
    model = fields.model or node.default_model_id
    if model is None:
        known = ", ".join(card.model_id for card in node.cards())
        raise InvalidRequest(f"'model' is missing, and this node has no default. It serves: {known}.", param="model")
    return model


def conversation_of(session: str | None, fields: BodyFields) -> str | None:
    """The conversation by the header `X-Session-Id`, which the client chose, else by the body."""
    return f"session {session[:256]}" if session else fields.conversation


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode("latin-1")


def headers_of_json(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers for the server. The body is JSON, whatever type the client gave it; the server looks at the type."""
    others = [header for header in forwardable(headers) if header[0] != b"content-type"]
    return [(b"content-type", b"application/json"), *others]


def read_priority(header: str | None) -> Priority:
    """The priority that `X-Priority` names, normal without that header. Raises InvalidRequest."""
    if header is None:
        return Priority.NORMAL
    try:
        return Priority[header.strip().upper()]
    except KeyError:
        allowed = ", ".join(priority.name.lower() for priority in Priority)
        raise InvalidRequest(
            f"'X-Priority' must be one of {allowed}, not {header[:40]!r}.", param="X-Priority"
        ) from None


def _card_json(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.model_id,
        "object": "model",
        "created": card.created,
        "owned_by": "rolemesh",
        "aliases": list(card.aliases),
    }
