"""By which names browsers may reach the node, by ASGI messages."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from trio.testing import MockClock

from fakes.asgi import Exchange
from fakes.gates import open_gate
from nodeagent.errors import HostForbidden
from nodeagent.front.app import create_app
from nodeagent.front.hosts import name_of, refuse_foreign_host
from nodeagent.front.seam import ModelCard, Node
from nodeagent.status import NodeState, NodeStatus

PAGE = "https://chat.example"


class BareNode:
    """Its names are `box` and `models.example`; a page that is listed may use it."""

    node_id = "box-a"
    max_request_bytes = 1000
    scheduler: Any = SimpleNamespace(lanes={})
    gate = open_gate()
    cors_origins = (PAGE,)
    host_names = ("box", "models.example")

    def cards(self) -> list[ModelCard]:
        return []

    def state(self) -> NodeState:
        return NodeState(NodeStatus.READY, (), can_serve=True)


NODE = cast(Node, BareNode())
FOREIGN = [
    "evil.example",
    "evil.example:8081",
    "localhost.evil.example",
    "box.evil.example",
    "127.0.0.1.evil",
    "",
    ":1",
]
OURS = [
    *("localhost", "localhost:8081", "LOCALHOST", "a.localhost", "127.0.0.1", "127.0.0.1:8081", "192.168.0.7:80"),
    *("[::1]", "[::1]:8081", "[fe80::1%eth0]:1", "box:8081", "Box.", "models.example"),
]


@pytest.mark.parametrize("host", FOREIGN)
@pytest.mark.parametrize("marks", [{"origin": PAGE}, {"fetch_site": "same-origin"}], ids=["Origin", "Sec-Fetch-Site"])
def test_a_browsers_request_under_another_name_is_refused(host: str, marks: dict[str, str]) -> None:
    with pytest.raises(HostForbidden) as refused:
        refuse_foreign_host(NODE, host, **{"origin": None, "fetch_site": None, **marks})
    assert refused.value.host == name_of(host)


@pytest.mark.parametrize("host", [*OURS, None])
def test_a_browsers_request_to_an_address_or_a_name_of_the_node_is_served(host: str | None) -> None:
    refuse_foreign_host(NODE, host, origin=PAGE, fetch_site="cross-site")


@pytest.mark.parametrize("host", FOREIGN)
def test_a_program_that_is_no_browser_is_never_refused_for_its_host(host: str) -> None:
    refuse_foreign_host(NODE, host, origin=None, fetch_site=None)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models"),
        ("GET", "/health"),
        ("GET", "/nothing"),
        ("GET", "/v1/node/queue"),
        ("GET", "/v1/node/events"),
        ("POST", "/v1/node/drain"),
        ("POST", "/v1/chat/completions"),
        ("OPTIONS", "/v1/models"),
    ],
)
async def test_every_path_is_guarded_and_the_error_names_the_host_and_the_key(
    method: str, path: str, autojump_clock: MockClock
) -> None:
    marks = [(b"host", b"evil.example:8081"), (b"sec-fetch-site", b"same-origin"), (b"authorization", b"Bearer token")]
    exchange = Exchange(*marks, method=method, path=path)
    await exchange.through(create_app(NODE))
    assert exchange.error() == (403, "host_forbidden")
    assert "'evil.example'" in exchange.content["error"]["message"]
    assert "allowed_hosts" in exchange.content["error"]["message"]
