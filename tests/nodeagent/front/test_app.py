"""The real application, by ASGI messages."""

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
import trio
from quart import Response
from trio.testing import MockClock

from fakes.asgi import Exchange
from fakes.gates import open_gate
from nodeagent.front.app import create_app
from nodeagent.front.seam import ModelCard, Node
from nodeagent.status import NodeState, NodeStatus


class BareNode:
    """What `create_app` needs of a node whose own routes are not called."""

    node_id = "box-a"
    max_request_bytes = 1000
    scheduler: Any = None
    gate = open_gate()
    cors_origins = ()

    def cards(self) -> list[ModelCard]:
        return []

    def state(self) -> NodeState:
        return NodeState(NodeStatus.READY, (), can_serve=True)

    def inventory_json(self, *, for_operators: bool = False) -> bytes:
        return b"{}"


async def test_a_stream_of_the_real_application_may_take_hours(autojump_clock: MockClock) -> None:
    app = create_app(cast(Node, BareNode()))

    @app.get("/hours")
    async def hours() -> Response:
        return Response(chunks())

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"chunk"
            await trio.sleep(3600)

    exchange = Exchange(method="GET", path="/hours")
    await exchange.through(app)
    assert [message.get("body") for message in exchange.sent[1:]] == [b"chunk", b"chunk", b"chunk", b""]
    assert trio.current_time() >= 3 * 3600


@pytest.mark.parametrize("path", ["/", "/nothing", "/v1", "/v1/nothing", "/chat"])
async def test_an_unknown_path_is_told_where_the_paths_are(path: str, autojump_clock: MockClock) -> None:
    exchange = Exchange(method="GET", path=path)
    await exchange.through(create_app(cast(Node, BareNode())))
    assert exchange.error() == (404, "not_found")
    message = exchange.content["error"]["message"]
    assert message.startswith(f"GET {path!r}: there is no such path. OpenAI's API is under /v1/")
    assert "/v1/chat/completions" in message
    assert "URL" not in message


async def test_a_wrong_method_is_told_the_methods_that_the_path_allows(autojump_clock: MockClock) -> None:
    exchange = Exchange(method="GET", path="/v1/chat/completions")
    await exchange.through(create_app(cast(Node, BareNode())))
    assert exchange.error() == (405, "method_not_allowed")
    message = exchange.content["error"]["message"]
    assert message.startswith("GET is not allowed on '/v1/chat/completions', only: OPTIONS, POST. OpenAI's API is")
    assert exchange.headers["allow"] == "OPTIONS, POST"


@pytest.mark.parametrize("path", ["/models", "/v1/models/", "/models/", "//v1/models", "/v1//models//", "/v1/models"])
async def test_a_path_is_served_however_it_is_spelt_and_never_redirected(path: str, autojump_clock: MockClock) -> None:
    exchange = Exchange(method="GET", path=path)
    await exchange.through(create_app(cast(Node, BareNode())))
    assert (exchange.sent[0]["status"], exchange.content) == (200, {"object": "list", "data": []})


@pytest.mark.parametrize("path", ["//", "//nothing//", "/models/x", "/v1/models//x"])
async def test_an_unknown_path_with_double_slashes_is_not_found(path: str, autojump_clock: MockClock) -> None:
    exchange = Exchange(method="GET", path=path)
    await exchange.through(create_app(cast(Node, BareNode())))
    assert exchange.error()[0] == 404


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/chat/completions", "OPTIONS, POST"),
        ("/completions/", "OPTIONS, POST"),
        ("/models", "GET, HEAD, OPTIONS"),
        ("/health", "GET, HEAD, OPTIONS"),
        ("/v1/node/drain", "OPTIONS, POST"),
    ],
)
async def test_options_are_told_without_content_and_without_a_token(
    path: str, allowed: str, autojump_clock: MockClock
) -> None:
    exchange = Exchange(method="OPTIONS", path=path)
    await exchange.through(create_app(cast(Node, BareNode())))
    assert exchange.sent[0]["status"] == 204
    assert exchange.headers["allow"] == allowed
    assert not {"content-length", "content-type"} & set(exchange.headers)
    unknown = Exchange(method="OPTIONS", path="/nothing")
    await unknown.through(create_app(cast(Node, BareNode())))
    assert unknown.error() == (404, "not_found")


async def test_a_long_path_is_shortened_in_the_error(autojump_clock: MockClock) -> None:
    exchange = Exchange(method="GET", path="/" + "x" * 10_000)
    await exchange.through(create_app(cast(Node, BareNode())))
    assert exchange.error() == (404, "not_found")
    assert len(exchange.content["error"]["message"]) < 500
