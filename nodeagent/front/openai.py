"""The routes of OpenAI's API, and the validation of their bodies. `inference.py` serves what is valid.

A body is forwarded unchanged; `request_body.py` reads what decides where it goes.
"""

from collections.abc import Iterable
from typing import Any

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


def blueprint(node: Node) -> Blueprint:
    """The routes under `/v1` that OpenAI's clients use."""
    routes = Blueprint("openai", __name__)
    inference = Inference(node.scheduler)

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_card_json(card) for card in node.cards()]}

    @routes.get("/v1/models/<path:model>")
    async def show_model(model: str) -> dict[str, Any]:
        return _card_json(find_card(node, model))

    @routes.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        return await _infer(node, inference, needs="messages")

    @routes.post("/v1/completions")
    async def completions() -> Response:
        return await _infer(node, inference, needs="prompt")

    return routes


async def _infer(node: Node, inference: Inference, *, needs: str) -> Response:
    # The end of input is how most clients leave, and a generation costs much.
    on_half_close(HalfClose.GRACE)
    answer = await inference.serve(await _read_request(node, needs), exit_stack())
    return Response(answer.body, status=answer.status, headers=Headers(answer.headers))


async def _read_request(node: Node, needs: str) -> InferenceRequest:
    body = await request.get_data(cache=False)
    assert isinstance(body, bytes)
    body = without_bom(body)
    fields = read_body(body, needs=needs)
    # On one device there is nothing to choose, so its requests need not be told apart.
    several = len(node.scheduler.lanes) > 1
    return InferenceRequest(
        request_id=request_id(),
        model_id=find_card(node, model_of(node, fields)).model_id,
        priority=read_priority(request.headers.get("X-Priority")),
        conversation=conversation_of(request.headers.get("X-Session-Id"), fields) if several else None,
        slots=fields.completions,
        path=request.path,
        headers=headers_of_json(request.headers),
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


def headers_of_json(headers: Iterable[tuple[str, str]]) -> list[tuple[bytes, bytes]]:
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
