"""The routes of OpenAI's API, and the validation of their bodies. `inference.py` serves what is valid.

A body is forwarded unchanged; only `model` and `stream` are read, and what identifies the conversation.
"""

from typing import Any

import pydantic_core
from quart import Blueprint, Response, request
from werkzeug.datastructures import Headers

from nodeagent.errors import InvalidRequest
from nodeagent.front.asgi import exit_stack, request_id
from nodeagent.front.conversation import conversation_of
from nodeagent.front.inference import Inference, InferenceRequest
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
    answer = await inference.serve(await _read_request(node, needs), exit_stack())
    return Response(answer.body, status=answer.status, headers=Headers(answer.headers))


async def _read_request(node: Node, needs: str) -> InferenceRequest:
    body = await request.get_data(cache=False)
    assert isinstance(body, bytes)
    fields = parse_body(body, needs=needs)
    # On one device there is nothing to choose, so its requests need not be told apart.
    several = len(node.scheduler.lanes) > 1
    return InferenceRequest(
        request_id=request_id(),
        model_id=find_card(node, fields["model"]).model_id,
        priority=read_priority(request.headers.get("X-Priority")),
        conversation=conversation_of(request.headers.get("X-Session-Id"), fields) if several else None,
        slots=_completions_wanted(fields),
        path=request.path,
        headers=forwardable(request.headers),
        body=body,
    )


def parse_body(body: bytes, *, needs: str) -> dict[str, Any]:
    """Parse a request for inference and check the fields that decide where it goes: the result has a `model`.

    `needs` is the field that every such request must have. Raises InvalidRequest. Everything else in the body is
    checked by the server.
    """
    try:
        data = pydantic_core.from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(data, dict):
        raise InvalidRequest(f"The body must be a JSON object, not {_kind(data)}.", code="invalid_json")
    model = data.get("model")
    if not isinstance(model, str) or not model:
        raise InvalidRequest(f"'model' must be the id of a model, not {_kind(model)}.", param="model")
    stream = data.get("stream")
    if not isinstance(stream, bool | None):
        raise InvalidRequest(f"'stream' must be true or false, not {_kind(stream)}.", param="stream")
    if data.get(needs) is None:
        raise InvalidRequest(f"'{needs}' is missing.", param=needs)
    if needs == "messages":
        _check_messages(data["messages"])
    return data


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


def _completions_wanted(fields: dict[str, Any]) -> int:
    """How many completions the request asks for. The server judges a bad `n`; until then it counts as one."""
    wanted = fields.get("n")
    return wanted if type(wanted) is int and wanted > 0 else 1


def _check_messages(messages: object) -> None:
    """Check the shape only. llama-server checks it too, but its error does not name the field."""
    if not isinstance(messages, list):
        raise InvalidRequest(f"'messages' must be a list of objects, not {_kind(messages)}.", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"'messages[{index}]' must be an object, not {_kind(message)}.", param="messages")


def _card_json(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.model_id,
        "object": "model",
        "created": card.created,
        "owned_by": "rolemesh",
        "aliases": list(card.aliases),
    }


def _kind(value: object) -> str:
    """A JSON value in words, short enough for an error message."""
    match value:
        case None:
            return "null or missing"
        case dict():
            return "an object"
        case list():
            return "a list"
        case "":
            return "an empty string"
        case str():
            return f"the string {value[:40]!r}"
        case bool():
            return "true" if value else "false"
        case _:
            return f"the number {value}"
