"""Which web pages may use the API, by ASGI messages."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from trio.testing import MockClock

from fakes.asgi import Exchange
from fakes.gates import open_gate
from nodeagent.front.app import create_app
from nodeagent.front.seam import ModelCard, Node
from nodeagent.status import NodeState, NodeStatus

LISTED = "https://chat.example"
BODY = b'{"model": "nothing", "messages": [{"role": "user"}]}'


class BareNode:
    """A node without models: a request that gets past the check is a 404."""

    node_id = "box-a"
    max_request_bytes = 1000
    scheduler: Any = SimpleNamespace(lanes={})
    gate = open_gate()
    default_model_id = None

    host_names = ("box",)

    def __init__(self, *origins: str) -> None:
        self.cors_origins = origins
        self.drained = 0

    def drain(self) -> None:
        self.drained += 1

    def cards(self) -> list[ModelCard]:
        return []

    def state(self) -> NodeState:
        return NodeState(NodeStatus.READY, (), can_serve=True)


async def exchanged(
    node: BareNode, origin: str | None, path: str = "/v1/chat/completions", method: str = "POST", **headers: str
) -> Exchange:
    sent = {"content-type": "text/plain", **({"origin": origin} if origin else {}), **headers}
    lines = [(name.replace("_", "-").encode(), value.encode()) for name, value in sent.items()]
    body = BODY if method == "POST" else b""
    exchange = Exchange((b"content-length", b"%d" % len(body)), *lines, method=method, path=path)
    exchange.body(body, more=False)
    await exchange.through(create_app(cast(Node, node)))
    return exchange


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:8081", "https://chat.example.evil"]
)
async def test_a_page_that_is_not_listed_can_not_make_the_node_work(origin: str, autojump_clock: MockClock) -> None:
    exchange = await exchanged(BareNode(LISTED), origin)
    assert exchange.error() == (403, "origin_forbidden")
    assert "access-control-allow-origin" not in exchange.headers


async def test_by_default_no_page_may(autojump_clock: MockClock) -> None:
    assert (await exchanged(BareNode(), LISTED)).error() == (403, "origin_forbidden")


async def test_a_program_that_is_no_browser_sends_no_origin_and_is_served(autojump_clock: MockClock) -> None:
    assert (await exchanged(BareNode(), None)).error() == (404, "model_not_found")


async def test_a_listed_page_is_served_and_may_read_the_response_errors_too(autojump_clock: MockClock) -> None:
    exchange = await exchanged(BareNode(LISTED), LISTED)
    assert exchange.error() == (404, "model_not_found")
    assert exchange.headers["access-control-allow-origin"] == LISTED
    assert "Origin" in exchange.headers["vary"]


async def test_a_preflight_of_a_listed_page_is_allowed_what_it_asks_for(autojump_clock: MockClock) -> None:
    asked = {"access_control_request_method": "POST", "access_control_request_headers": "authorization, content-type"}
    exchange = await exchanged(BareNode(LISTED), LISTED, method="OPTIONS", **asked)
    assert exchange.sent[0]["status"] == 204
    assert exchange.headers["access-control-allow-headers"] == "authorization, content-type"
    assert "POST" in exchange.headers["access-control-allow-methods"]
    other = await exchanged(BareNode(LISTED), "https://evil.example", method="OPTIONS", **asked)
    assert "access-control-allow-origin" not in other.headers


async def test_a_page_can_not_read_what_others_may(autojump_clock: MockClock) -> None:
    exchange = await exchanged(BareNode(LISTED), "https://evil.example", "/v1/models", "GET")
    assert exchange.sent[0]["status"] == 200
    assert "access-control-allow-origin" not in exchange.headers
    assert "Origin" in exchange.headers["vary"]


async def test_no_other_page_may_use_an_operators_path_not_even_a_listed_one(autojump_clock: MockClock) -> None:
    for method in ("POST", "OPTIONS"):
        exchange = await exchanged(BareNode(LISTED), LISTED, "/v1/node/drain", method, authorization="Bearer token")
        assert exchange.error() == (403, "origin_forbidden")
        assert "access-control-allow-origin" not in exchange.headers


OWN = {"host": "127.0.0.1:8081", "origin": "http://127.0.0.1:8081"}
FOREIGN = [
    {"host": "127.0.0.1:8081", "origin": "http://127.0.0.1:3000"},
    {"host": "127.0.0.1:8081", "origin": "http://127.0.0.1:8081", "sec-fetch-site": "cross-site"},
    {"host": "127.0.0.1:8081", "origin": "http://127.0.0.1:8081", "sec-fetch-site": "same-site"},
    {"host": "127.0.0.1:8081", "origin": "null"},
    {"host": "box", "origin": "http://box.evil.example"},
    {"host": "box:80", "origin": "ftp://box:80"},
    {"origin": "http://127.0.0.1:8081"},
    {"origin": ""},
]


@pytest.mark.parametrize(
    "marks",
    [
        OWN,
        OWN | {"sec-fetch-site": "same-origin"},
        {"host": "box", "origin": "https://box"},  # behind a proxy that speaks TLS
        {"host": "box", "origin": "https://box:8443", "sec-fetch-site": "same-origin"},  # that also drops the port
    ],
)
async def test_the_nodes_own_page_may_use_everything_with_the_token(
    marks: dict[str, str], autojump_clock: MockClock
) -> None:
    node = BareNode()
    token = {"authorization": "Bearer token"}
    exchange = await sent(node, "/v1/node/drain", marks | token)
    assert (exchange.sent[0]["status"], node.drained) == (200, 1)
    assert (await sent(node, "/v1/node/drain", marks)).error() == (401, "invalid_admin_token")
    assert (await sent(node, "/v1/node/drain", marks | {"authorization": "Bearer x"})).error()[0] == 401
    assert (await sent(node, "/v1/chat/completions", marks)).error() == (404, "model_not_found")
    assert "access-control-allow-origin" not in exchange.headers
    assert node.drained == 1


@pytest.mark.parametrize("marks", FOREIGN)
async def test_another_page_may_not_although_it_has_the_token(marks: dict[str, str], autojump_clock: MockClock) -> None:
    node = BareNode()
    for path in ("/v1/node/drain", "/v1/chat/completions"):
        exchange = await sent(node, path, marks | {"authorization": "Bearer token"})
        assert exchange.error() == (403, "origin_forbidden")
    assert node.drained == 0


async def test_a_page_under_a_name_that_is_not_the_nodes_is_not_its_own(autojump_clock: MockClock) -> None:
    """DNS rebinding: to the browser, the page and the node are one origin."""
    node = BareNode()
    marks = {"host": "evil.example", "origin": "http://evil.example", "authorization": "Bearer token"}
    for site in ({}, {"sec-fetch-site": "same-origin"}):
        assert (await sent(node, "/v1/node/drain", marks | site)).error() == (403, "host_forbidden")
    assert node.drained == 0


async def sent(node: BareNode, path: str, headers: dict[str, str]) -> Exchange:
    lines = [(name.encode(), value.encode()) for name, value in headers.items()]
    exchange = Exchange((b"content-length", b"%d" % len(BODY)), *lines, path=path)
    exchange.body(BODY, more=False)
    await exchange.through(create_app(cast(Node, node)))
    return exchange
