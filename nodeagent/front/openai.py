"""OpenAI's surface: the models, and requests for inference relayed to the server that a lane grants.

A body is forwarded as it came; only `model` and `stream` are read out of it.
"""

import logging
from dataclasses import dataclass
from typing import Any

import pydantic_core
import trio
from quart import Blueprint, Response, request
from werkzeug.datastructures import Headers

from nodeagent.errors import (
    BackendCrashed,
    BackendUnavailable,
    InvalidRequest,
    ModelLoadTimeout,
    PoisonedRequest,
    Refusal,
    UpstreamLost,
)
from nodeagent.front.asgi import exit_stack, request_id
from nodeagent.front.conversation import conversation_of
from nodeagent.front.poison import PoisonGuard
from nodeagent.front.refusals import error_event
from nodeagent.front.seam import ModelCard, Node, find_card
from nodeagent.front.server import AbortResponse
from nodeagent.llama_server.headers import forwardable
from nodeagent.llama_server.relay import Upstream, UpstreamResponse, is_loading_answer
from nodeagent.scheduling.lease import Lease, Ticket
from nodeagent.scheduling.queueing import Priority

logger = logging.getLogger(__name__)

# A killed child's sockets close a moment before its exit is known. This is how long its end may take to show; a
# connection that broke while the server lives on (a fault of its own) is tried again after it.
_EXIT_NOTICE_S = 1.0
_LOADING_RETRY_S = 1.0
_STOPPED_RETRY_S = 1.0


def blueprint(node: Node) -> Blueprint:
    """The routes under `/v1` that OpenAI's clients use."""
    routes = Blueprint("openai", __name__)
    poison = PoisonGuard()

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_card_json(card) for card in node.cards()]}

    @routes.get("/v1/models/<path:model>")
    async def show_model(model: str) -> dict[str, Any]:
        return _card_json(find_card(node, model))

    @routes.post("/v1/chat/completions")
    async def chat_completions() -> Response:
        return await _infer(node, poison, needs="messages")

    @routes.post("/v1/completions")
    async def completions() -> Response:
        return await _infer(node, poison, needs="prompt")

    return routes


async def _infer(node: Node, poison: PoisonGuard, *, needs: str) -> Response:
    """One request for inference, from its bytes to the answer's first bytes."""
    body = await request.get_data(cache=False)
    assert isinstance(body, bytes)
    wanted = read_wanted(body, needs=needs)
    card = find_card(node, wanted.model)
    priority = read_priority(request.headers.get("X-Priority"))
    _refuse_poison(poison, body, card.model_id)
    conversation = None
    if len(node.scheduler.lanes) > 1:  # else there is nothing to choose by it
        conversation = conversation_of(request.headers.get("X-Session-Id"), wanted.body)
    ticket = node.scheduler.admit(request_id(), card.model_id, priority, conversation)
    exit_stack().callback(ticket.close)
    message = _Message(request.path, forwardable(request.headers), body)
    lease, answer = await _first_answer(node, ticket, message, poison)
    node.scheduler.conversations.served(conversation, lease.device_id)
    exit_stack().callback(answer.close)
    return Response(
        _Relay(answer, lease, body, poison),
        status=answer.status,
        headers=Headers([*answer.headers, *_headers(lease, answer)]),
    )


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the agent itself reads of a request for inference: `model` as the client wrote it, and the whole `body`."""

    model: str
    stream: bool
    body: dict[str, Any]


def read_wanted(body: bytes, *, needs: str) -> Wanted:
    """Read the fields that decide where a request goes; `needs` is the one without which no server could answer.

    Raises InvalidRequest. What else is in the body is the server's to judge.
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
    return Wanted(model, bool(stream), data)


def read_priority(header: str | None) -> Priority:
    """The value of `X-Priority`, normal where there is none; raises InvalidRequest."""
    if header is None:
        return Priority.NORMAL
    try:
        return Priority[header.strip().upper()]
    except KeyError:
        allowed = ", ".join(priority.name.lower() for priority in Priority)
        raise InvalidRequest(
            f"'X-Priority' must be one of {allowed}, not {header[:40]!r}.", param="X-Priority"
        ) from None


def _check_messages(messages: object) -> None:
    """The shape alone; llama-server's own word on it would not name the field."""
    if not isinstance(messages, list):
        raise InvalidRequest(f"'messages' must be a list of objects, not {_kind(messages)}.", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InvalidRequest(f"'messages[{index}]' must be an object, not {_kind(message)}.", param="messages")


@dataclass(frozen=True, slots=True)
class _Message:
    """A request as it is forwarded."""

    path: str
    headers: list[tuple[bytes, bytes]]
    body: bytes


async def _first_answer(
    node: Node, ticket: Ticket[Upstream], message: _Message, poison: PoisonGuard
) -> tuple[Lease[Upstream], UpstreamResponse]:
    """Wait for the lease and the answer's first bytes; a server that dies before them is forgiven once."""
    lease = await ticket.granted()
    _refuse_poison(poison, message.body, lease.model_id)
    try:
        return lease, await _ask(lease, message)
    except UpstreamLost as lost:
        _refuse_if_stopped(lease, lost)
        logger.warning("%s: lost %s before it answered (%s); trying once more", lease.device_id, lease.model_id, lost)
        await _note_fall(poison, message.body, lease)
    node.scheduler.requeue(ticket)
    lease = await ticket.granted()
    _refuse_poison(poison, message.body, lease.model_id)
    try:
        return lease, await _ask(lease, message)
    except UpstreamLost as lost:
        _refuse_if_stopped(lease, lost)
        await _note_fall(poison, message.body, lease)
        raise BackendCrashed(lease.model_id, lease.device_id, lost.reason) from lost


def _refuse_if_stopped(lease: Lease[Upstream], lost: UpstreamLost) -> None:
    """Where the server was told to end under its requests, to try again would undo that, and no request is to blame."""
    if lease.endpoint.ends_as_asked:
        raise _stopped(lease) from lost


def _stopped(lease: Lease[Upstream]) -> BackendUnavailable:
    return BackendUnavailable(lease.model_id, f"its server on {lease.device_id} was stopped", _STOPPED_RETRY_S)


def _refuse_poison(poison: PoisonGuard, body: bytes, model_id: str) -> None:
    """Looked at when a request comes and again when it is to be sent: others of the same body may have felled since."""
    blocked_s = poison.blocked_s(body, trio.current_time())
    if blocked_s:
        raise PoisonedRequest(model_id, blocked_s)


async def _ask(lease: Lease[Upstream], message: _Message) -> UpstreamResponse:
    answer = await lease.endpoint.open("POST", message.path, message.headers, message.body)
    if is_loading_answer(answer):
        answer.close()
        raise ModelLoadTimeout(lease.model_id, lease.device_id, 0.0, _LOADING_RETRY_S)
    return answer


async def _note_fall(poison: PoisonGuard, body: bytes, lease: Lease[Upstream]) -> None:
    """Wait until the end of the lease's server shows, so that the next grant is not of the same dead server."""
    with trio.move_on_after(_EXIT_NOTICE_S):
        await lease.endpoint.closed.wait()
        poison.felled(body, trio.current_time())


class _Relay:
    """The answer's body as the client gets it, chunk by chunk as it comes.

    An event stream that breaks ends with an error event, and no body that breaks ends cleanly: clients take a clean
    end for success.
    """

    def __init__(self, answer: UpstreamResponse, lease: Lease[Upstream], body: bytes, poison: PoisonGuard) -> None:
        self._answer = answer
        self._lease = lease
        self._body = body
        self._poison = poison
        self._broken: UpstreamLost | None = None

    def __aiter__(self) -> "_Relay":
        return self

    async def __anext__(self) -> bytes:
        if self._broken is not None:
            raise AbortResponse(str(self._broken)) from self._broken
        try:
            chunk = await self._answer.next_chunk()
        except UpstreamLost as lost:
            logger.warning("%s: lost %s in mid-answer: %s", self._lease.device_id, self._lease.model_id, lost)
            self._broken = lost
            if not self._lease.endpoint.ends_as_asked:
                await _note_fall(self._poison, self._body, self._lease)
            if not self._answer.event_stream:
                raise AbortResponse(str(lost)) from lost
            return error_event(self._why(lost), request_id())
        if chunk is None:
            self._poison.survived(self._body)
            raise StopAsyncIteration
        return chunk

    def _why(self, lost: UpstreamLost) -> Refusal:
        if self._lease.endpoint.ends_as_asked:
            return _stopped(self._lease)
        return BackendCrashed(self._lease.model_id, self._lease.device_id, lost.reason)


def _card_json(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.model_id,
        "object": "model",
        "created": card.created,
        "owned_by": "rolemesh",
        "aliases": list(card.aliases),
    }


def _headers(lease: Lease[Upstream], answer: UpstreamResponse) -> list[tuple[str, str]]:
    server_s = trio.current_time() - lease.granted_at
    phases = {"queue": lease.queued_s, "load": lease.load_s, "server": server_s}
    headers = [
        ("X-Node-Device", lease.device_id),
        ("X-Node-Queue-Ms", f"{lease.queued_s * 1000:.0f}"),
        ("X-Node-Load-Ms", f"{lease.load_s * 1000:.0f}"),
        # Up to the first byte of the answer, in milliseconds: https://www.w3.org/TR/server-timing/
        ("Server-Timing", ", ".join(f"{phase};dur={took_s * 1000:.1f}" for phase, took_s in phases.items())),
    ]
    if answer.event_stream:
        # nginx would buffer the stream, and others might cache it.
        headers += [("X-Accel-Buffering", "no"), ("Cache-Control", "no-cache")]
    return headers


def _kind(value: object) -> str:
    """What a person would call a JSON value, short enough for an error."""
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
