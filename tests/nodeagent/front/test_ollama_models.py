"""Ollama's paths that show models, by ASGI messages."""

import json
from typing import Any, cast

import pytest
from trio.testing import MockClock

from fakes.asgi import Exchange
from fakes.gates import open_gate
from nodeagent.front.app import create_app
from nodeagent.front.seam import ModelCard, ModelDetails, Node

DETAILS = {
    "chat": ModelDetails(
        state="loaded",
        failed=False,
        ctx_size=4096,
        embedding_length=64,
        size_bytes=1000,
        architecture="qwen3",
        size_label="8B",
        takes_images=True,
    ),
    "embed": ModelDetails(state="unloaded", failed=False),
}


class Shown:
    """What `create_app` needs of a node with two models; nothing is known of the second one's file."""

    max_request_bytes = 1000
    scheduler: Any = None
    cors_origins = ()
    gate = open_gate()

    def cards(self) -> list[ModelCard]:
        return [ModelCard("chat", ("small",), 7, "chat"), ModelCard("embed", (), 7, "embedding")]

    def details(self, model_id: str) -> ModelDetails:
        return DETAILS[model_id]


async def ask(method: str, path: str, body: bytes = b"") -> Exchange:
    exchange = Exchange(method=method, path=path)
    exchange.body(body, more=False)
    await exchange.through(create_app(cast(Node, Shown())))
    return exchange


async def test_the_models_are_listed_with_what_is_known_of_them(autojump_clock: MockClock) -> None:
    first, second = (await ask("GET", "/api/tags")).content["models"]
    digest = first.pop("digest")
    assert first == {
        "name": "chat",
        "model": "chat",
        "modified_at": "1970-01-01T00:00:07Z",
        "size": 1000,
        "details": {
            "parent_model": "",
            "format": "gguf",
            "family": "qwen3",
            "families": ["qwen3"],
            "parameter_size": "8B",
            "quantization_level": "unknown",
        },
    }
    assert (len(digest), digest == second["digest"]) == (64, False)
    assert (second["size"], second["details"]["families"]) == (0, [])


async def test_those_that_are_loaded_are_listed_with_their_context(autojump_clock: MockClock) -> None:
    [loaded] = (await ask("GET", "/api/ps")).content["models"]
    assert (loaded["name"], loaded["context_length"]) == ("chat", 4096)


@pytest.mark.parametrize("fields", [{"model": "chat"}, {"name": "small:latest"}, {"model": "small", "verbose": True}])
async def test_one_is_shown_with_what_it_can_do(fields: dict[str, Any], autojump_clock: MockClock) -> None:
    shown = (await ask("POST", "/api/show", json.dumps(fields).encode())).content
    assert shown["capabilities"] == ["completion", "tools", "vision"]
    assert shown["model_info"] == {
        "general.architecture": "qwen3",
        "qwen3.context_length": 4096,
        "qwen3.embedding_length": 64,
    }


async def test_one_of_which_little_is_known_is_shown_too(autojump_clock: MockClock) -> None:
    shown = (await ask("POST", "/api/show", b'{"model": "embed"}')).content
    assert (shown["capabilities"], shown["model_info"]) == (["embedding"], {"general.architecture": "unknown"})


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "The body is not valid JSON"),
        (b"[" * 100_000, 413, "The body is longer"),
        (b"[" * 900, 400, "The body is not valid JSON"),
        (b"[]", 400, "The body must be a JSON object."),
        (b"{}", 400, "'model' must be the id of a model."),
        (b'{"model": 3}', 400, "'model' must be the id of a model."),
        (b'{"model": "huge"}', 404, "It serves: chat, embed."),
    ],
)
async def test_a_wrong_question_is_answered_in_ollamas_shape(
    body: bytes, status: int, message: str, autojump_clock: MockClock
) -> None:
    exchange = await ask("POST", "/api/show", body)
    assert exchange.sent[0]["status"] == status
    assert list(exchange.content) == ["error"]
    assert message in exchange.content["error"]


@pytest.mark.parametrize("path", ["/api/version", "/api/tags", "//api/ps/"])
async def test_clients_may_look_with_head(path: str, autojump_clock: MockClock) -> None:
    exchange = await ask("HEAD", path)
    assert exchange.sent[0]["status"] == 200


async def test_what_there_is_not_is_an_error_in_ollamas_shape(autojump_clock: MockClock) -> None:
    for method, path, status in (("POST", "/api/pull", 404), ("GET", "/api/chat", 405)):
        exchange = await ask(method, path)
        assert (exchange.sent[0]["status"], list(exchange.content)) == (status, ["error"])
