"""The routes of inference, and the validation of their bodies. `inference.py` serves what is valid.

A body is forwarded unchanged; `request_body.py` reads what decides where it goes. One of Ollama's is translated first.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import trio
from msgspec.structs import replace

from nodeagent.errors import BodyTooLarge, InvalidRequest, WrongTask
from nodeagent.front.accounts import account_var
from nodeagent.front.asgi import on_half_close, releases, request_id
from nodeagent.front.endpoints import ENDPOINTS, Dialect, Endpoint, Slots
from nodeagent.front.first_bytes import InferenceRequest
from nodeagent.front.half_close import HalfClose
from nodeagent.front.header_text import as_text, text_of
from nodeagent.front.inference import Inference
from nodeagent.front.ollama_requests import translate
from nodeagent.front.remote_media import refuse_remote_media
from nodeagent.front.request_body import BodyFields, read_body, without_bom
from nodeagent.front.seam import ModelCard, Node, find_card, visible_cards
from nodeagent.llama_server.headers import forwardable
from nodeagent.scheduling.queueing import Priority

if TYPE_CHECKING:
    from quart import Blueprint, Response

_SLOTS = {Slots.ONE: 1, Slots.NONE: 0}
_PRIORITIES = {priority.name.lower(): priority for priority in Priority}


def blueprint(node: Node, inference: Inference) -> "Blueprint":
    """The routes that clients of OpenAI, Anthropic, Ollama and llama-server use."""
    from quart import Blueprint, Response, request
    from werkzeug.datastructures import Headers

    routes = Blueprint("openai", __name__)

    async def infer() -> "Response":
        # The end of input is how most clients leave, and a generation costs much.
        on_half_close(HalfClose.GRACE)
        body = await request.get_data(cache=False)
        assert isinstance(body, bytes)
        headers = [(name.lower(), value) for name, value in request.scope["headers"]]
        valid = read_request(node, request_id=request_id(), path=request.path, headers=headers, body=body)
        answer = await inference.serve(valid, releases())
        return Response(answer.body, status=answer.status, headers=Headers(as_text(answer.headers)))

    for path in ENDPOINTS:
        routes.post(path, endpoint=path.replace("/", "_"))(infer)
    return routes


def read_request(
    node: Node, *, request_id: str, path: str, headers: list[tuple[bytes, bytes]], body: bytes
) -> InferenceRequest:
    """Check a request for inference; the names of `headers` are lower case. Raises InvalidRequest and ModelNotFound."""
    client_path, dialect, translated = path, ENDPOINTS[path].dialect, None
    # On one device there is nothing to choose, so its requests need not be told apart.
    several = len(node.scheduler.lanes) > 1
    if dialect is Dialect.OLLAMA:
        translated = translate(path, without_bom(body), node.default_model_id, trio.current_time())
        path, body = translated.path, translated.body
    endpoint = ENDPOINTS[path]
    values = dict(headers)
    if endpoint.is_form:
        from nodeagent.front.request_form import read_form  # with werkzeug, which other requests do not need

        fields = read_form(body, text_of(values.get(b"content-type")), needs=endpoint.needs)
    else:
        body = without_bom(body)
        fields = read_body(body, needs=endpoint.needs, instead=endpoint.instead, identify=several)
    card = find_card(node, model_of_name(node, fields.model))
    _check_task(node, card, endpoint)
    if card.max_request_bytes is not None and len(body) > card.max_request_bytes:
        raise BodyTooLarge(card.max_request_bytes, card.model_id)
    if endpoint.may_have_media and not node.allow_remote_media:
        refuse_remote_media(body)
    streamed = fields.stream and endpoint.streams
    request = InferenceRequest(
        request_id=request_id,
        model_id=card.model_id,
        priority=allowed_priority(read_priority(text_of(values.get(b"x-priority")))),
        conversation=conversation_of(text_of(values.get(b"x-session-id")), fields) if several else None,
        slots=_SLOTS.get(endpoint.slots, fields.completions),
        ping_s=node.stream_ping_s if streamed else 0.0,
        streamed=streamed,
        dialect=dialect,
        client_path=client_path,
        translator=translated.translator if translated else None,
        answer=translated.answer if translated else None,
        path=path,
        headers=forwardable(headers) if endpoint.is_form else headers_of_json(headers),
        body=_with_parameters(body, card, endpoint),
    )
    return _with_fallbacks(node, request, card, endpoint, body) if card.fallback else request


def _with_parameters(body: bytes, card: ModelCard, endpoint: Endpoint) -> bytes:
    """The body with the model's own parameters, if it has any; a form stays as it is."""
    return body if card.parameters is None or endpoint.is_form else card.parameters.put_into(body)


def _with_fallbacks(
    node: Node, request: InferenceRequest, card: ModelCard, endpoint: Endpoint, body: bytes
) -> InferenceRequest:
    """The request with those for the models that may serve it instead: that this key may use, and that are able."""
    cards = {other.model_id: other for other in visible_cards(node)}
    others = [cards[name] for name in card.fallback if name in cards]
    able = [
        other
        for other in others
        if _can_do(other, endpoint) and (other.max_request_bytes is None or len(body) <= other.max_request_bytes)
    ]
    instead = (
        replace(request, model_id=other.model_id, body=_with_parameters(body, other, endpoint)) for other in able
    )
    return replace(request, fallbacks=tuple(instead))


def model_of_name(node: Node, named: str | None) -> str:
    """The model of that name, else the node's default. Raises InvalidRequest if there is none."""
    model = named or node.default_model_id
    if model is None:
        known = ", ".join(card.model_id for card in visible_cards(node))
        raise InvalidRequest(f"'model' is missing, and this node has no default. It serves: {known}.", param="model")
    return model


def _check_task(node: Node, card: ModelCard, endpoint: Endpoint) -> None:
    """Refuse what the model can't do before it is loaded, and another one evicted for it. Raises WrongTask."""
    if _can_do(card, endpoint):
        return
    able = [other.model_id for other in visible_cards(node) if other.task == endpoint.task]
    raise WrongTask(card.model_id, card.task or "", endpoint.task or "", able)


def _can_do(card: ModelCard, endpoint: Endpoint) -> bool:
    """Whether the model is for what the path is for, as far as that is known."""
    return endpoint.task is None or card.task in (None, endpoint.task)


def conversation_of(session: str | None, fields: BodyFields) -> str | None:
    """The conversation by the header `X-Session-Id`, which the client chose, else by the body."""
    return f"session {session[:256]}" if session else fields.conversation


def headers_of_json(headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers for the server. The body is JSON, whatever type the client gave it; the server looks at the type."""
    others = [header for header in forwardable(headers) if header[0] != b"content-type"]
    return [(b"content-type", b"application/json"), *others]


def allowed_priority(wanted: Priority) -> Priority:
    """The priority that a request gets: at most that of its API key."""
    account = account_var.get()
    return wanted if account is None else max(wanted, _PRIORITIES[account.entry.priority])


def read_priority(header: str | None) -> Priority:
    """The priority that `X-Priority` names, normal without that header. Raises InvalidRequest."""
    if header is None:
        return Priority.NORMAL
    try:
        return _PRIORITIES[header.strip().lower()]
    except KeyError:
        allowed = ", ".join(_PRIORITIES)
        raise InvalidRequest(
            f"'X-Priority' must be one of {allowed}, not {header[:40]!r}.", param="X-Priority"
        ) from None
