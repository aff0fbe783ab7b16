"""The models and their loaded servers, looked at in virtual time."""

from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from fakes.asgi import Exchange
from fakes.gates import open_gate
from fakes.upstream import Act, Loss, UpstreamServers
from nodeagent.front.app import create_app
from nodeagent.front.seam import ModelCard, ModelDetails, Node
from nodeagent.llama_server.relay import Upstream


class Shown:
    """What `create_app` needs of a node with one model."""

    max_request_bytes = 1000
    scheduler: Any = None
    cors_origins = ()
    default_model_id = "a"
    gate = open_gate()

    def __init__(self, server: Upstream | None) -> None:
        self._server = server

    def cards(self) -> list[ModelCard]:
        return [ModelCard("a", ("small",), 7, "chat")]

    def details(self, model_id: str) -> ModelDetails:
        return ModelDetails(state="loaded", failed=False, server=self._server, ctx_train=64)


@pytest.fixture
async def servers(nursery: trio.Nursery) -> UpstreamServers:
    return UpstreamServers(nursery)


async def upstream_of(servers: UpstreamServers) -> Upstream:
    await servers.ensure("a")
    [view] = servers.views()
    assert view.endpoint is not None
    return view.endpoint


async def shown(node: Shown, path: str) -> Exchange:
    exchange = Exchange(method="GET", path=path)
    await exchange.through(create_app(cast(Node, node)))
    return exchange


async def test_a_model_has_openais_fields_and_llama_servers(autojump_clock: MockClock) -> None:
    assert (await shown(Shown(None), "/v1/models/small")).content == {
        "id": "a",
        "object": "model",
        "created": 7,
        "owned_by": "rolemesh",
        "aliases": ["small"],
        "roles": [],
        "tags": [],
        "task": "chat",
        "meta": {"n_ctx_train": 64},
        "status": {"value": "loaded", "failed": False},
    }


async def test_a_server_is_asked_for_its_slots_once_in_two_seconds(
    servers: UpstreamServers, autojump_clock: MockClock
) -> None:
    app = create_app(cast(Node, Shown(await upstream_of(servers))))
    servers.acts.extend([Act(chunks=(b"[1, ", b"2]")), Act(chunks=(b"[3]",))])
    answers: list[Any] = []
    for _ in range(5):
        exchange = Exchange(method="GET", path="/slots")
        await exchange.through(app)
        answers.append(exchange.content)
        await trio.sleep(0.9)
    assert answers == [[1, 2], [1, 2], [1, 2], [3], [3]]
    assert [(sent.method, sent.path) for sent in servers.sent] == [("GET", "/slots")] * 2
    assert servers.in_flight == 0


@pytest.mark.parametrize("act", [Act(loss=Loss.SERVER_LIVES), Act(chunk_s=60.0)], ids=["lost", "hangs"])
async def test_a_server_that_does_not_answer_is_told_as_unavailable(
    act: Act, servers: UpstreamServers, autojump_clock: MockClock
) -> None:
    node = Shown(await upstream_of(servers))
    servers.acts.append(act)
    assert (await shown(node, "/props")).error() == (503, "backend_unavailable")
    assert servers.in_flight == 0


async def test_what_is_not_loaded_is_not_found(autojump_clock: MockClock) -> None:
    assert (await shown(Shown(None), "/props")).error() == (404, "model_not_loaded")
