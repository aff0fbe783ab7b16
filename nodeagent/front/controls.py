"""`/v1/chat/completions/control`: tells the server that answers a chat completion to end its reasoning.

Only the completion's id says which one is meant, and only its server knows that, so the servers are asked in turn. They
are asked whether or not their slots are busy, and nothing is loaded for it.
"""

from collections.abc import Iterator

import msgspec
from quart import Blueprint, Response, request

from nodeagent.errors import BackendUnavailable, InvalidRequest
from nodeagent.front.accounts import may_use
from nodeagent.front.request_body import kind_of, parse_object, without_bom
from nodeagent.front.seam import Node, find_card
from nodeagent.front.window import ask, no_answer
from nodeagent.llama_server.relay import Upstream

PATH = "/v1/chat/completions/control"

_BODY = msgspec.json.Decoder(dict[str, msgspec.Raw])
_JSON = "application/json"
# As llama-server's own, which answers so too.
_NOBODY = msgspec.json.encode({"success": False, "message": "no active completion for this id"})


class _Outcome(msgspec.Struct):
    success: bool = False


def blueprint(node: Node) -> Blueprint:
    """The route."""
    routes = Blueprint("controls", __name__)

    @routes.post(PATH)
    async def control() -> Response:
        body = await request.get_data(cache=False)
        assert isinstance(body, bytes)
        body = without_bom(body)
        silent = None
        for model_id, server in _servers(node, _read(node, body)):
            try:
                status, content = await ask(model_id, server, "POST", PATH, body)
            except BackendUnavailable:
                silent = model_id
                continue
            if status != 200 or _has_succeeded(content):
                return Response(content, status=status, content_type=_JSON)
        if silent is not None:
            raise no_answer(silent, PATH)
        return Response(_NOBODY, content_type=_JSON)

    return routes


def _read(node: Node, body: bytes) -> str | None:
    """The id of the model that the body names, None if it names none. Raises InvalidRequest, and what `find_card`
    raises."""
    fields = parse_object(body, _BODY)
    texts = {name: _text(fields, name) for name in ("id", "action", "model")}
    for name in ("id", "action"):
        if texts[name] is None:
            raise InvalidRequest(f"'{name}' is missing.", param=name)
    named = texts["model"]
    return None if named is None else find_card(node, named).model_id


def _text(fields: dict[str, msgspec.Raw], name: str) -> str | None:
    raw = fields.get(name, msgspec.Raw(b"null"))
    try:
        return msgspec.json.decode(raw, type=str | None)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequest(f"'{name}' must be a string, not {kind_of(raw)}.", param=name) from None


def _servers(node: Node, model_id: str | None) -> Iterator[tuple[str, Upstream]]:
    """The servers that are ready and may be meant, with the ids of their models: none that the key is not for."""
    for _device_id, of, server in list(node.scheduler.ready_servers()):
        if model_id in (None, of) and may_use(of):
            yield of, server


def _has_succeeded(content: bytes) -> bool:
    try:
        return msgspec.json.decode(content, type=_Outcome).success
    except msgspec.DecodeError:
        return False
