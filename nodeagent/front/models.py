"""The models and their loaded servers, to look at. Nothing here loads a model, or postpones an idle unload.

`/v1/models` has OpenAI's fields, and those of llama-server's that its clients read. `/props` and `/slots` are the
loaded server's own answers.
"""

from collections.abc import Mapping
from typing import Any, Final
from weakref import WeakKeyDictionary

import trio
from quart import Blueprint, Response, request

from nodeagent.errors import BackendUnavailable, ModelNotLoaded, UpstreamLost
from nodeagent.front.accounts import may_use
from nodeagent.front.openai import model_of_name
from nodeagent.front.seam import ModelCard, ModelDetails, Node, find_card
from nodeagent.llama_server.relay import Upstream

# A server that is asked for its slots more often than once a second does not notice that a client has left a request
# that is not streamed.
_GOOD_S: Final = 2.0
_TIMEOUT_S: Final = 5.0
_RETRY_S: Final = 1.0


def blueprint(node: Node) -> Blueprint:
    """The routes that show models and servers."""
    routes = Blueprint("models", __name__)
    windows = {"/props": _Window("/props"), "/slots": _Window("/slots")}

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [_json(card, node.details(card.model_id)) for card in node.cards() if may_use(card.model_id)],
        }

    @routes.get("/v1/models/<path:model>")
    async def show_model(model: str) -> dict[str, Any]:
        card = find_card(node, model)
        return _json(card, node.details(card.model_id))

    @routes.get("/props")
    @routes.get("/slots")
    async def show_server() -> Response:
        model_id = find_card(node, model_of_name(node, request.args.get("model"))).model_id
        server = node.details(model_id).server
        if server is None:
            raise ModelNotLoaded(model_id)
        status, content = await windows[request.path].look(model_id, server)
        return Response(content, status=status, content_type="application/json")

    return routes


class _Window:
    """What servers answer on one path; they are asked at most once each `_GOOD_S`.

    What changes: `_seen` (the last answer of each server, and until when it is good) and `_asking`, in `look`.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen = WeakKeyDictionary[Upstream, tuple[float, tuple[int, bytes]]]()
        self._asking = trio.Lock()

    async def look(self, model_id: str, server: Upstream) -> tuple[int, bytes]:
        """The status and body that the server answers, or has just answered. Raises BackendUnavailable."""
        async with self._asking:
            good_until, seen = self._seen.get(server, (0.0, (0, b"")))
            if trio.current_time() < good_until:
                return seen
            try:
                with trio.fail_after(_TIMEOUT_S):
                    seen = await self._ask(server)
            except (UpstreamLost, trio.TooSlowError) as error:
                raise BackendUnavailable(model_id, f"its server does not answer {self._path}", _RETRY_S) from error
            self._seen[server] = trio.current_time() + _GOOD_S, seen
            return seen

    async def _ask(self, server: Upstream) -> tuple[int, bytes]:
        sent = server.request("GET", self._path, [], b"")
        try:
            response = await sent.response()
            content = b""
            while (chunk := await response.next_chunk()) is not None:
                content += chunk
            return response.status, content
        finally:
            sent.close()


def _json(card: ModelCard, details: ModelDetails) -> dict[str, Any]:
    meta: Mapping[str, int | None] = {
        "n_ctx": details.ctx_size,
        "n_ctx_train": details.ctx_train,
        "n_embd": details.embedding_length,
        "size": details.size_bytes,
    }
    return {
        "id": card.model_id,
        "object": "model",
        "created": card.created,
        "owned_by": "rolemesh",
        "aliases": list(card.aliases),
        "tags": [],
        "roles": list(card.roles),
        "task": card.task,
        "meta": {key: value for key, value in meta.items() if value is not None},
        "status": {"value": details.state, "failed": details.failed},
    }
