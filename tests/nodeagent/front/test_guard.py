"""Which role each path of the application needs, and what a key sees."""

import re
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from quart_trio import QuartTrio
from trio.testing import MockClock

from fakes.asgi import Exchange
from nodeagent.access.gate import Gate
from nodeagent.config import ApiKeyConfig
from nodeagent.config.api_keys import digest_of
from nodeagent.front.app import create_app
from nodeagent.front.endpoints import ENDPOINTS
from nodeagent.front.guard import given_key, role_for
from nodeagent.front.health import PATHS
from nodeagent.front.seam import ModelCard, ModelDetails, Node


@pytest.mark.parametrize(
    ("headers", "key"),
    [
        ((None, None), None),
        ((b"Bearer k", None), b"k"),
        ((b"BEARER  k  ", b"x"), b"k"),
        ((b"Bearer ", None), b""),
        ((b"Bearerk", None), None),
        ((b"Basic abc", b"x"), b"x"),
        ((None, b"x"), b"x"),
    ],
)
def test_the_key_is_in_authorization_or_in_anthropics_header(
    headers: tuple[bytes | None, bytes | None], key: bytes | None
) -> None:
    names = (b"authorization", b"x-api-key")
    assert given_key({name: value for name, value in zip(names, headers, strict=True) if value is not None}) == key


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        *(("GET", path, None) for path in PATHS),
        ("OPTIONS", "/v1/node/drain", None),
        ("GET", "/metrics", "metrics"),
        ("GET", "/v1/node/inventory", "metrics"),
        ("GET", "/v1/node/queue", "metrics"),
        ("GET", "/v1/node/events", "admin"),
        ("POST", "/v1/node/models/inventory/load", "admin"),
        ("POST", "/upstream/a/livez", "admin"),
        ("GET", "/v1/models", "inference"),
        ("GET", "/nowhere", "inference"),
        *(("POST", path, "inference") for path in ENDPOINTS),
    ],
)
def test_each_path_needs_one_role(method: str, path: str, role: str | None) -> None:
    assert role_for(method, path) == role


class Keyed:
    """What `create_app` needs of a node with two models and these keys."""

    max_request_bytes = 1000
    scheduler: Any = None
    cors_origins = ()
    default_model_id = None
    node_id = "box"

    def __init__(self) -> None:
        entries = [
            ApiKeyConfig(name="one", sha256=digest_of("one"), models=("a",)),
            ApiKeyConfig(name="all", sha256=digest_of("all")),
            ApiKeyConfig(name="root", sha256=digest_of("root"), roles=("admin",)),
            ApiKeyConfig(name="scraper", sha256=digest_of("scraper"), roles=("metrics",)),
        ]
        self.gate = Gate("token", Path("/nonexistent"), {entry.sha256 or "": entry for entry in entries})

    def cards(self) -> list[ModelCard]:
        return [ModelCard("a", ("small",), 7, "chat"), ModelCard("b", ("large",), 7, "chat")]

    def details(self, model_id: str) -> ModelDetails:
        return ModelDetails(state="unloaded", failed=False)


async def asked(path: str, key: str | None = None, method: str = "GET", *, of: QuartTrio | None = None) -> Exchange:
    """An exchange with this application, or a new one."""
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    exchange = Exchange(*headers, method=method, path=path)
    await exchange.through(create_app(cast(Node, Keyed())) if of is None else of)
    return exchange


# By the role that a path needs, the keys that open it.
OPENED_BY: dict[str | None, set[str | None]] = {
    "inference": {"one", "all", "root", "token"},
    "metrics": {"scraper", "root", "token"},
    "admin": {"root", "token"},
    None: {None, "wrong", "one", "all", "scraper", "root", "token"},
}


def is_closed(sent: list[dict[str, Any]], method: str) -> bool:
    """Whether this answer refuses the key or its role, in any API's shape."""
    status = sent[0]["status"]
    body = b"".join(message.get("body", b"") for message in sent)
    return status == 401 or (status == 403 and (method == "HEAD" or b"lacks the role" in body))


async def test_each_kind_of_key_opens_the_routes_of_its_roles_and_no_others(autojump_clock: MockClock) -> None:
    app = create_app(cast(Node, Keyed()))
    opened = 0
    for rule in app.url_map.iter_rules():
        path = re.sub("<[^>]*>", "a", rule.rule)
        for method in rule.methods or set():
            for key in OPENED_BY[None]:
                headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
                exchange = Exchange(*headers, method=method, path=path)
                # A handler that is reached fails for want of a node, or waits.
                with trio.move_on_after(1):
                    await exchange.through(app)
                closed = bool(exchange.sent) and is_closed(exchange.sent, method)
                assert closed != (key in OPENED_BY[role_for(method, path)]), (method, path, key)
                opened += not closed
    assert opened > 100


async def test_a_key_sees_only_its_models(autojump_clock: MockClock) -> None:
    assert [model["id"] for model in (await asked("/v1/models", "one")).content["data"]] == ["a"]
    assert [model["id"] for model in (await asked("/v1/models", "all")).content["data"]] == ["a", "b"]
    assert (await asked("/v1/models/small", "one")).content["id"] == "a"
    refused = await asked("/v1/models/large", "one")
    assert refused.error() == (403, "model_forbidden")
    assert "only: a." in refused.content["error"]["message"]
    unknown = await asked("/v1/models/c", "one")
    assert unknown.error() == (404, "model_not_found")
    assert unknown.content["error"]["message"] == "The model 'c' is not served here. It serves: a."


async def test_operators_see_the_keys_without_their_secrets(autojump_clock: MockClock) -> None:
    for key in ("root", "token"):
        answer = await asked("/v1/node/keys", key)
        assert [one["name"] for one in answer.content["keys"]] == ["one", "all", "root", "scraper"]
        assert answer.content["keys"][0]["models"] == ["a"]
        assert answer.content["keys"][0]["used"]["requests"] == 0
        assert digest_of("one") not in str(answer.content)
