"""Ollama's paths that show models. Nothing here loads a model."""

import hashlib
import json
from datetime import UTC, datetime
from typing import Any, Final

from quart import Blueprint, request

from nodeagent.errors import InvalidRequest
from nodeagent.front.seam import ModelCard, ModelDetails, Node, find_card, visible_cards

# The release of Ollama whose API this is. Clients compare it with what they need; our own version would be too small.
_VERSION: Final = "0.12.6"
_CAPABILITIES: Final = {"chat": ("completion", "tools"), "embedding": ("embedding",), None: ("completion",)}


def blueprint(node: Node) -> Blueprint:
    """The routes that Ollama's clients look at before they ask a model."""
    routes = Blueprint("ollama", __name__)

    @routes.get("/api/version")
    async def version() -> dict[str, Any]:
        return {"version": _VERSION}

    @routes.get("/api/tags")
    async def list_models() -> dict[str, Any]:
        return {"models": [_json(card, node.details(card.model_id)) for card in visible_cards(node)]}

    @routes.get("/api/ps")
    async def list_loaded() -> dict[str, Any]:
        models = [(card, node.details(card.model_id)) for card in visible_cards(node)]
        return {"models": [_loaded_json(card, details) for card, details in models if details.state == "loaded"]}

    @routes.post("/api/show")
    async def show_model() -> dict[str, Any]:
        card = find_card(node, _named(await request.get_data(cache=False)))
        return _show_json(card, node.details(card.model_id))

    return routes


def _named(body: bytes | str) -> str:
    """The model's name in the body; older clients call the field `name`."""
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"The body is not valid JSON: {error}.", code="invalid_json") from None
    if not isinstance(fields, dict):
        raise InvalidRequest("The body must be a JSON object.", code="invalid_json")
    name = fields.get("model") or fields.get("name")
    if not isinstance(name, str):
        raise InvalidRequest("'model' must be the id of a model.", param="model")
    return name


def _json(card: ModelCard, details: ModelDetails) -> dict[str, Any]:
    size_bytes = details.size_bytes or 0
    # Of Ollama it is the hash of the model's files, which takes minutes; here it only tells models apart.
    digest = hashlib.sha256(f"{card.model_id} {size_bytes}".encode()).hexdigest()
    return {
        "name": card.model_id,
        "model": card.model_id,
        "modified_at": _time(card),
        "size": size_bytes,
        "digest": digest,
        "details": _details_json(details),
    }


def _loaded_json(card: ModelCard, details: ModelDetails) -> dict[str, Any]:
    return {**_json(card, details), "context_length": details.ctx_size}


def _show_json(card: ModelCard, details: ModelDetails) -> dict[str, Any]:
    architecture = details.architecture or "unknown"
    info = {
        "general.architecture": architecture,
        f"{architecture}.context_length": details.ctx_size,
        f"{architecture}.embedding_length": details.embedding_length,
    }
    seeing = ["vision"] if details.takes_images else []
    return {
        "modified_at": _time(card),
        "details": _details_json(details),
        "model_info": {key: value for key, value in info.items() if value is not None},
        "capabilities": [*_CAPABILITIES.get(card.task, ()), *seeing],
    }


def _details_json(details: ModelDetails) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf",
        "family": details.architecture,
        "families": [details.architecture] if details.architecture else [],
        "parameter_size": details.size_label,
        "quantization_level": "unknown",
    }


def _time(card: ModelCard) -> str:
    return datetime.fromtimestamp(card.created, UTC).isoformat().replace("+00:00", "Z")
