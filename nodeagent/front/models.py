"""The models and their loaded servers, to look at. Nothing here loads a model, or postpones an idle unload.

`/v1/models` has OpenAI's fields, and those of llama-server's that its clients read. `/props` and `/slots` are the
loaded server's own answers.
"""

from collections.abc import Mapping
from typing import Any

from quart import Blueprint, Response, request

from nodeagent.errors import ModelNotLoaded
from nodeagent.front.openai import model_of_name
from nodeagent.front.seam import ModelCard, ModelDetails, Node, find_card, visible_cards
from nodeagent.front.window import Window


def blueprint(node: Node, slots: Window) -> Blueprint:
    """The routes that show models and servers; `slots` is that on `/slots`."""
    routes = Blueprint("models", __name__)
    windows = {"/props": Window("/props"), "/slots": slots}

    @routes.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        return {
            "object": "list",
            "data": [_json(card, node.details(card.model_id)) for card in visible_cards(node)],
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
