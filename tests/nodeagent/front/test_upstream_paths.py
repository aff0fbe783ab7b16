"""The rest of a server's surface, below `/upstream`: where it leads, and where nobody may."""

from typing import Any, cast

import pytest
import trio
from trio.testing import MockClock

from fakes.asgi import Exchange
from fakes.gates import open_gate
from fakes.upstream import Act, UpstreamServers
from nodeagent.errors import InvalidRequest, ModelNotFound, PathForbidden
from nodeagent.front.app import create_app
from nodeagent.front.seam import ModelCard, Node
from nodeagent.front.upstream import refuse_forbidden, split
from nodeagent.llama_server.relay import Upstream
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.scheduler import Scheduler

TOKEN = (b"authorization", b"Bearer token")


class OneDevice:
    """A node with some models on one device."""

    max_request_bytes = 1000
    gate = open_gate()
    cors_origins = ("https://chat.example",)
    host_names: set[str] = set()

    def __init__(self, servers: UpstreamServers) -> None:
        self.servers = servers
        rules = LaneRules(max_pending=2, queue_timeout_s=100, startup_timeout_s=30)
        self.lane: Lane[Upstream] = Lane("cpu:0", servers, rules)
        self.scheduler = Scheduler({"cpu:0": self.lane}, {"cpu:0": servers})
        servers.fake.on_change = self.lane.nudge

    def cards(self) -> list[ModelCard]:
        return [ModelCard("a", ("alias/of/a",), 0), ModelCard("a/b", (), 0)]


@pytest.fixture
async def node(nursery: trio.Nursery) -> OneDevice:
    node = OneDevice(UpstreamServers(nursery))
    await nursery.start(node.lane.run)
    return node


async def ask(
    node: OneDevice, method: str, path: str, *headers: tuple[bytes, bytes], body: bytes = b"", query: bytes = b""
) -> Exchange:
    exchange = Exchange(*headers, method=method, path=path)
    exchange.scope["query_string"] = query
    exchange.body(body, more=False)
    await exchange.through(create_app(cast(Node, node)))
    return exchange


@pytest.mark.parametrize(
    ("where", "model_id", "path"),
    [
        ("a", "a", "/"),
        ("a/metrics", "a", "/metrics"),
        ("a/b", "a/b", "/"),
        ("a/b/metrics", "a/b", "/metrics"),
        ("a/c/metrics", "a", "/c/metrics"),
        ("alias/of/a/v1/models", "a", "/v1/models"),
        ("a:latest/props", "a", "/props"),
    ],
)
def test_the_longest_name_of_a_model_counts(where: str, model_id: str, path: str) -> None:
    card, rest = split(cast(Node, OneDevice.__new__(OneDevice)), where)
    assert (card.model_id, rest) == (model_id, path)


def test_a_path_that_begins_with_no_model_is_not_found() -> None:
    with pytest.raises(ModelNotFound) as refused:
        split(cast(Node, OneDevice.__new__(OneDevice)), "metrics/a")
    assert refused.value.model == "metrics"


@pytest.mark.parametrize("path", ["/", "/metrics", "/slots", "/v1/models", "/models", "/props", "/lora-adapters"])
def test_the_rest_may_be_read(path: str) -> None:
    refuse_forbidden("GET", path)


def test_what_an_operator_may_change_is_open() -> None:
    for path in ("/lora-adapters", "/props", "/v1/chat/completions", "/toolset"):
        refuse_forbidden("POST", path)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/tools"),
        ("POST", "/tools/run"),
        ("POST", "/TOOLS"),
        ("GET", "/cors-proxy"),
        ("POST", "/slots/0"),
        ("GET", "/slots/0"),
        ("POST", "/slots"),
        ("POST", "/models/load"),
        ("GET", "/models/sse"),
        ("POST", "/models"),
        ("DELETE", "/v1/models"),
        ("POST", "/v1/models/unload"),
        ("GET", "/v1/stream"),
        ("DELETE", "/v1/stream/x"),
        ("POST", "/v1/streams/lookup"),
    ],
)
def test_what_leads_out_of_the_node_is_forbidden(method: str, path: str) -> None:
    with pytest.raises(PathForbidden):
        refuse_forbidden(method, path)


@pytest.mark.parametrize("path", ["/x/../tools", "/./tools", "//tools", "/..", "/x//y"])
def test_a_path_that_could_be_read_in_two_ways_is_refused(path: str) -> None:
    with pytest.raises(InvalidRequest, match="without empty segments and dots"):
        refuse_forbidden("GET", path)


async def test_a_request_loads_its_model_and_is_sent_as_it_is(node: OneDevice, autojump_clock: MockClock) -> None:
    node.servers.acts.append(Act(status=202, chunks=(b"[]",)))
    path, query = "/upstream/a/lora adapters/\N{SNOWMAN}", b"x=1&y=%20\r\n"
    exchange = await ask(node, "PUT", path, TOKEN, (b"content-type", b"text/x"), body=b"[1]", query=query)
    assert exchange.sent[0]["status"] == 202
    assert exchange.headers["x-node-device"] == "cpu:0"
    [sent] = node.servers.sent
    assert (sent.method, sent.path, sent.body) == ("PUT", "/lora%20adapters/%E2%98%83?x=1&y=%20%0D%0A", b"[1]")
    assert sent.headers == [(b"content-type", b"text/x")], "the operator's token is not passed on"
    assert node.servers.fake.views()[0].model_id == "a"


async def test_a_head_asks_as_a_get(node: OneDevice, autojump_clock: MockClock) -> None:
    exchange = await ask(node, "HEAD", "/upstream/a/metrics", TOKEN)
    assert (exchange.sent[0]["status"], node.servers.sent[0].method) == (200, "GET")


@pytest.mark.parametrize(
    ("headers", "path", "error"),
    [
        ([], "/upstream/a/metrics", (401, "invalid_admin_token")),
        ([(b"authorization", b"Bearer x")], "/upstream/a/metrics", (401, "invalid_admin_token")),
        ([TOKEN, (b"origin", b"https://chat.example")], "/upstream/a/metrics", (403, "origin_forbidden")),
        ([TOKEN], "/upstream/a/tools", (403, "path_forbidden")),
        ([TOKEN], "/upstream/nothing/metrics", (404, "model_not_found")),
    ],
)
async def test_nothing_is_loaded_for_a_request_that_is_refused(
    headers: list[tuple[bytes, bytes]],
    path: str,
    error: tuple[int, str],
    node: OneDevice,
    autojump_clock: MockClock,
) -> None:
    exchange = await ask(node, "GET", path, *headers)
    assert exchange.error() == error
    assert "access-control-allow-origin" not in exchange.headers
    assert (node.servers.sent, node.servers.fake.views()) == ([], [])


async def test_a_body_is_limited_as_elsewhere(node: OneDevice, autojump_clock: MockClock) -> None:
    exchange = Exchange(TOKEN, method="POST", path="/upstream/a/props")
    exchange.body(b"x" * 2000, more=False)
    await exchange.through(create_app(cast(Node, node)), max_request_bytes=1000)
    assert exchange.error() == (413, "request_too_large")


async def test_an_operator_ends_a_request_and_others_only_see_it(
    node: OneDevice, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    node.servers.acts.append(Act(chunk_s=60.0))
    app: Any = create_app(cast(Node, node))
    asked = Exchange((b"x-request-id", b"mine"), path="/v1/completions")
    asked.body(b'{"model": "a", "prompt": "x"}', more=False)
    nursery.start_soon(asked.through, app)
    await trio.sleep(30.0)

    async def request(method: str, path: str, *headers: tuple[bytes, bytes]) -> Exchange:
        exchange = Exchange(*headers, method=method, path=path)
        await exchange.through(app)
        return exchange

    [shown] = (await request("GET", "/v1/node/requests")).content["requests"]
    assert (shown["request_id"], shown["state"], shown["path"]) == ("mine", "in_flight", "/v1/completions")
    path = f"/v1/node/requests/{shown['id']}"
    assert (await request("DELETE", path)).error() == (401, "invalid_admin_token")
    assert asked.sent == []
    ended = await request("DELETE", path, TOKEN)
    assert (ended.sent[0]["status"], ended.content["request_id"]) == (200, "mine")
    await trio.testing.wait_all_tasks_blocked()
    assert asked.error() == (503, "request_cancelled")
    assert asked.headers["x-should-retry"] == "false"
    assert (await request("DELETE", path, TOKEN)).error() == (404, "request_not_found")
    assert (await request("GET", "/v1/node/requests")).content == {"requests": []}
