"""`/upstream/{model_id}/...`: whatever else a model's server answers, for operators.

Such a request is queued and loads its model as one for inference does. It is sent as it is, to any path but those of
`_FORBIDDEN`: they would lead out of the node, or change behind its back what it relies on.
"""

from typing import Final
from urllib.parse import quote

from quart import Blueprint, Response, request
from werkzeug.datastructures import Headers

from nodeagent.errors import InvalidRequest, PathForbidden
from nodeagent.front.asgi import on_half_close, releases, request_id
from nodeagent.front.endpoints import ENDPOINTS, Slots
from nodeagent.front.first_bytes import InferenceRequest
from nodeagent.front.half_close import HalfClose
from nodeagent.front.header_text import as_text
from nodeagent.front.inference import Inference
from nodeagent.front.seam import ModelCard, Node, find_card
from nodeagent.llama_server.headers import forwardable

_METHODS: Final = ("GET", "POST", "PUT", "PATCH", "DELETE")
# The first segments of paths of llama-server, and why nobody may reach these and what is below them.
_FORBIDDEN: Final = {
    ("tools",): "it runs commands on this host",
    ("cors-proxy",): "it fetches from this node's network for others",
    ("stream",): "it leads to the answers of other clients",
    ("streams",): "it leads to the answers of other clients",
    ("v1", "stream"): "it leads to the answers of other clients",
    ("v1", "streams"): "it leads to the answers of other clients",
}
# These are fine to read as a list; what is below them, or changes them, is not.
_READ_ONLY: Final = {
    ("slots",): "saving, restoring and erasing the cache of a slot is the node's",
    ("models",): "loading and unloading models is the node's",
    ("v1", "models"): "loading and unloading models is the node's",
}
# RFC 3986's characters of a path, and of a query.
_PATH_CHARS: Final = "/:@!$&'()*+,;=~"
_QUERY_CHARS: Final = _PATH_CHARS + "?%[]"


def add_routes(admin: Blueprint, node: Node, inference: Inference) -> None:
    """Add the route to those of operators."""

    @admin.route("/upstream/<path:where>", methods=_METHODS)
    async def ask_server(where: str) -> Response:
        on_half_close(HalfClose.GRACE)
        card, path = split(node, where)
        refuse_forbidden(request.method, path)
        body = await request.get_data(cache=False)
        assert isinstance(body, bytes)
        endpoint = ENDPOINTS.get(path)
        query = quote(request.query_string, safe=_QUERY_CHARS)
        asked = InferenceRequest(
            request_id=request_id(),
            model_id=card.model_id,
            slots=1 if endpoint is not None and endpoint.slots is not Slots.NONE else 0,
            client_path=request.path,
            # Without a body no response to HEAD is complete for the relay; our own has none either.
            method="GET" if request.method == "HEAD" else request.method,
            path=quote(path, safe=_PATH_CHARS) + (f"?{query}" if query else ""),
            headers=forwardable([(name.lower(), value) for name, value in request.scope["headers"]]),
            body=body,
        )
        answer = await inference.serve(asked, releases())
        return Response(answer.body, status=answer.status, headers=Headers(as_text(answer.headers)))


def split(node: Node, where: str) -> tuple[ModelCard, str]:
    """The model, and the path of its server: an id may have slashes in it, so the longest that fits counts. Raises
    ModelNotFound."""
    segments = where.split("/")
    names = {name for card in node.cards() for name in (card.model_id, *card.aliases)}
    for length in range(len(segments), 0, -1):
        name = "/".join(segments[:length])
        if name in names:
            return find_card(node, name), "/" + "/".join(segments[length:])
    return find_card(node, segments[0]), "/" + "/".join(segments[1:])


def refuse_forbidden(method: str, path: str) -> None:
    """Raise PathForbidden for a path that nobody may reach, and InvalidRequest for one that is not plain."""
    segments = tuple(path.lower().removeprefix("/").split("/"))
    if path != "/" and not {"", ".", ".."}.isdisjoint(segments):
        raise InvalidRequest(f"The path must be without empty segments and dots, not {path[:100]!r}.")
    for start, reason in _FORBIDDEN.items():
        if segments[: len(start)] == start:
            raise PathForbidden(path, reason)
    for start, reason in _READ_ONLY.items():
        is_below = segments[: len(start)] == start and len(segments) > len(start)
        if is_below or (segments == start and method not in ("GET", "HEAD")):
            raise PathForbidden(path, reason)
