"""What ends the reasoning of a completion finds the server that answers it, in virtual time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from fakes.asgi import Exchange
from fakes.upstream import Act, Loss, UpstreamServers
from nodeagent.access.gate import Gate
from nodeagent.config import ApiKeyConfig
from nodeagent.config.api_keys import digest_of
from nodeagent.front.app import create_app
from nodeagent.front.controls import PATH
from nodeagent.front.seam import ModelCard, Node
from nodeagent.llama_server.relay import Upstream

NOT_MINE = Act(chunks=(b'{"success":false,"message":"no active completion for this id"}',))
DONE = Act(chunks=(b'{"success":true}',))
ORDER = {"id": "chatcmpl-x", "action": "reasoning_end"}


class TwoModels:
    """What `create_app` needs of a node whose models `a` and `b` each have a server; `one` is a key for `a` alone."""

    max_request_bytes = 1000
    cors_origins = ()
    default_model_id = None
    scheduler: Any

    def __init__(self, servers: dict[str, UpstreamServers], *, keyed: bool = False) -> None:
        self.scheduler = self
        self._servers = servers
        entries = {digest_of("one"): ApiKeyConfig(name="one", sha256=digest_of("one"), models=("a",))} if keyed else {}
        self.gate = Gate("token", Path("/nonexistent"), entries)
        self.lanes = {"gpu:0": None}

    def cards(self) -> list[ModelCard]:
        return [ModelCard("a", ("small",), 7, "chat"), ModelCard("b", (), 7, "chat")]

    def ready_servers(self) -> Iterator[tuple[str, str, Upstream]]:
        for model_id, servers in self._servers.items():
            for view in servers.views():
                if view.endpoint is not None:
                    yield "gpu:0", model_id, view.endpoint


@pytest.fixture
async def servers(nursery: trio.Nursery) -> dict[str, UpstreamServers]:
    found = {model_id: UpstreamServers(nursery) for model_id in "ab"}
    for model_id, each in found.items():
        await each.ensure(model_id)
    return found


async def asked(node: TwoModels, body: object, *headers: tuple[bytes, bytes], path: str = PATH) -> Exchange:
    exchange = Exchange(*headers, path=path)
    exchange.body(body if isinstance(body, bytes) else json.dumps(body).encode(), more=False)
    await exchange.through(create_app(cast(Node, node)))
    return exchange


@pytest.mark.parametrize("path", [PATH, "/chat/completions/control"])
async def test_the_servers_are_asked_until_one_has_done_it(
    path: str, servers: dict[str, UpstreamServers], autojump_clock: MockClock
) -> None:
    servers["a"].acts.append(NOT_MINE)
    servers["b"].acts.append(DONE)
    assert (await asked(TwoModels(servers), ORDER, path=path)).content == {"success": True}
    for each in servers.values():
        [sent] = each.sent
        assert (sent.method, sent.path, json.loads(sent.body)) == ("POST", PATH, ORDER)
        assert each.in_flight == 0


async def test_a_model_in_the_body_is_the_only_one_that_is_asked(
    servers: dict[str, UpstreamServers], autojump_clock: MockClock
) -> None:
    servers["a"].acts.append(NOT_MINE)
    exchange = await asked(TwoModels(servers), ORDER | {"model": "small"})
    assert (exchange.sent[0]["status"], exchange.content["success"]) == (200, False)
    assert servers["b"].sent == []


async def test_a_key_reaches_no_completion_of_models_that_it_is_not_for(
    servers: dict[str, UpstreamServers], autojump_clock: MockClock
) -> None:
    node = TwoModels(servers, keyed=True)
    servers["a"].acts.append(NOT_MINE)
    key = (b"authorization", b"Bearer one")
    assert (await asked(node, ORDER, key)).content["success"] is False
    assert servers["b"].sent == []
    assert (await asked(node, ORDER | {"model": "b"}, key)).error() == (403, "model_forbidden")
    assert (await asked(node, ORDER)).error() == (401, "invalid_api_key")
    assert servers["b"].sent == []


async def test_what_the_server_refuses_is_passed_on(
    servers: dict[str, UpstreamServers], autojump_clock: MockClock
) -> None:
    refusal = b'{"error":{"code":400,"message":"unknown control action","type":"invalid_request_error"}}'
    servers["a"].acts.append(Act(chunks=(refusal,), status=400))
    exchange = await asked(TwoModels(servers), ORDER | {"action": "dance"})
    assert (exchange.sent[0]["status"], exchange.content["error"]["message"]) == (400, "unknown control action")


async def test_a_server_that_does_not_answer_hides_no_other(
    servers: dict[str, UpstreamServers], autojump_clock: MockClock
) -> None:
    servers["a"].acts.append(Act(loss=Loss.SERVER_LIVES))
    servers["b"].acts.append(DONE)
    assert (await asked(TwoModels(servers), ORDER)).content == {"success": True}
    servers["a"].acts.append(Act(chunk_s=60.0))
    servers["b"].acts.append(NOT_MINE)
    assert (await asked(TwoModels(servers), ORDER)).error() == (503, "backend_unavailable")


async def test_without_a_server_there_is_no_such_completion(autojump_clock: MockClock) -> None:
    assert (await asked(TwoModels({}), ORDER)).content == {
        "success": False,
        "message": "no active completion for this id",
    }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "The body is not valid JSON"),
        (b"{", "The body is not valid JSON"),
        (b"[]", "The body must be a JSON object, not a list."),
        (b'{"id": "\xff"}', "The body is not valid JSON"),
        ({"action": "reasoning_end"}, "'id' is missing."),
        ({"id": "x"}, "'action' is missing."),
        ({"id": 3, "action": "reasoning_end"}, "'id' must be a string, not the number 3."),
        (ORDER | {"model": ["a"]}, "'model' must be a string, not a list."),
        (ORDER | {"model": "huge"}, "The model 'huge' is not served here"),
    ],
)
async def test_what_is_wrong_with_the_body_is_said(
    body: object, message: str, servers: dict[str, UpstreamServers], autojump_clock: MockClock
) -> None:
    exchange = await asked(TwoModels(servers), body)
    assert exchange.sent[0]["status"] in (400, 404)
    assert message in exchange.content["error"]["message"]
    assert all(each.sent == [] for each in servers.values())
