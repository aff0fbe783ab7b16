"""Inference on both roads, by real sockets: the fast one and that of the web framework give the same answers."""

import gc
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from fakes import http2_client
from fakes.gates import open_gate
from fakes.serving import Peer, Served, start_serving
from fakes.upstream import Act, Loss, UpstreamServers
from nodeagent.access.gate import Gate
from nodeagent.config import ApiKeyConfig
from nodeagent.config.api_keys import digest_of
from nodeagent.front.app import create_app
from nodeagent.front.asgi import Front
from nodeagent.front.body_budget import RequestBody
from nodeagent.front.endpoints import ENDPOINTS
from nodeagent.front.fast_road import FastRoad
from nodeagent.front.inference import Inference
from nodeagent.front.seam import ModelCard, Node
from nodeagent.llama_server.relay import Upstream
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.scheduler import Scheduler
from nodeagent.status import NodeState, NodeStatus

MAX_BYTES = 2000
PAGE = "https://chat.example"
CHAT = {"model": "a", "messages": [{"role": "user", "content": "hello"}]}
FORM = (
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nRIFF\r\n'
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nalias\r\n--b--\r\n'
)
STREAM = Act(chunks=(b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"), event_stream=True)
# Of Ollama's answers.
DIFFERING = re.compile(rb'"(?:created_at|total_duration|load_duration)":[^,}]+')
OLLAMAS_WHOLE = b'{"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}]}'
OLLAMAS_STREAM = (
    b'data: {"choices": [{"delta": {"content": "x"}}]}\n\n',
    b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n',
)
ROADS = ["fast", "ordinary"]
# The same by HTTP/2.
ALL_ROADS = [*ROADS, "fast by HTTP/2", "ordinary by HTTP/2"]


class OneModel:
    """A node with one model on one device, whose servers answer by a script."""

    node_id = "box-a"
    max_request_bytes = MAX_BYTES
    default_model_id = "a"
    stream_ping_s = 0.0
    allow_remote_media = False
    cors_origins = (PAGE,)
    host_names = {"n"}
    status = NodeStatus.READY

    def __init__(self, nursery: trio.Nursery, gate: Gate | None = None) -> None:
        self.gate = gate or open_gate()
        self.servers = UpstreamServers(nursery)
        rules = LaneRules(max_pending=2, queue_timeout_s=100, startup_timeout_s=30)
        self.lane: Lane[Upstream] = Lane("cpu:0", self.servers, rules)
        self.scheduler = Scheduler({"cpu:0": self.lane}, {"cpu:0": self.servers})
        self.servers.fake.on_change = self.lane.nudge
        self.servers.fake.load_s = 0.0

    def cards(self) -> list[ModelCard]:
        return [ModelCard("a", ("alias",), 0)]

    def state(self) -> NodeState:
        return NodeState(self.status, (), can_serve=True)

    def inventory_json(self, *, for_operators: bool = False) -> bytes:
        if self.status is NodeStatus.STOPPING:
            raise RuntimeError("a bug")
        return json.dumps({"for_operators": for_operators}).encode()


class Road:
    """The front with that node, whose inference takes one of the two roads."""

    def __init__(self, node: OneModel, served: Served, front: Front, *, speaks_http2: bool) -> None:
        self.node = node
        self.served = served
        self.front = front
        self.speaks_http2 = speaks_http2

    async def ask(self, request: bytes) -> tuple[bytes, dict[str, str], bytes]:
        """The status line, the headers and the body of what is answered until the connection closes."""
        if self.speaks_http2:
            return await http2_client.ask(self.served.port, request)
        head, _, body = (await self.served.ask(request)).partition(b"\r\n\r\n")
        status, *lines = head.split(b"\r\n")
        return status, dict(line.decode().lower().split(": ", 1) for line in lines), body

    def assert_nothing_is_held(self) -> None:
        held = (self.node.scheduler.admitted, self.node.servers.in_flight, self.front.body_bytes_held)
        assert held == (0, 0, 0)


async def start(nursery: trio.Nursery, road: str, *, stream_ping_s: float = 0.0, gate: Gate | None = None) -> Road:
    node = OneModel(nursery, gate)
    node.stream_ping_s = stream_ping_s
    await nursery.start(node.lane.run)
    inference = Inference(node.scheduler)
    this = cast(Node, node)
    front = Front(create_app(this, inference), max_request_bytes=MAX_BYTES, node_id="box-a")
    options: dict[str, Any] = {}
    if road.startswith("fast"):
        options["find_handler"] = FastRoad(this, front, inference).find_handler
    if speaks_http2 := road.endswith("HTTP/2"):
        context = http2_client.server_context()
        options["find_tls"] = lambda: context
    return Road(node, await start_serving(nursery, front, **options), front, speaks_http2=speaks_http2)


def post(
    body: Any = CHAT,
    path: str = "/v1/chat/completions",
    version: str = "1.1",
    close: bool = True,
    host: str = "n",
    **headers: str,
) -> bytes:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/{version}", f"Host: {host}", f"Content-Length: {len(content)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    lines += ["Connection: close"] if close else []
    return "\r\n".join([*lines, "", ""]).encode() + content


def comparable(headers: dict[str, str]) -> dict[str, str]:
    """Without what differs from request to request."""
    # Before the web framework, the ordinary road does not know whether a page asks.
    changing = ("vary", "date", "server-timing", "x-node-queue-ms", "x-node-load-ms", "x-request-id")
    return {name: value for name, value in sorted(headers.items()) if name not in changing}


CHUNKED_BODY = json.dumps(CHAT).encode()
CHUNKED = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: n\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"1\r\n%c\r\n" % byte for byte in CHUNKED_BODY)
    + b"0\r\n\r\n"
)


@pytest.mark.parametrize(
    ("request_", "act", "status"),
    [
        (post(), Act(), 200),
        (post({"prompt": "x"}, "/v1/completions"), Act(status=201), 201),
        (post(CHAT | {"model": "alias"}, x_request_id="mine"), Act(), 200),
        (post(CHAT | {"stream": True}), STREAM, 200),
        (post(CHAT | {"stream": True}, version="1.0"), STREAM, 200),
        (post(), Act(chunks=(b"one", b"two")), 200),
        (post(b"\xef\xbb\xbf" + json.dumps(CHAT).encode()), Act(), 200),
        (post(path="/v1/chat/completions?x=y"), Act(), 200),
        (post(path="/chat/completions"), Act(), 200),
        (post(path="//v1///chat/completions/"), Act(), 200),
        (post({"prompt": "x"}, path="/completions/?x=y"), Act(), 200),
        (post({"prompt": "x"}, path="/v1/completion"), Act(), 404),
        (post(path="/v1/models"), Act(), 405),
        (CHUNKED, Act(), 200),
        (post(Origin=PAGE), Act(), 200),
        (post(Origin="https://evil.example"), Act(), 403),
        (post(Origin=PAGE, host="evil.example"), Act(), 403),
        (post(Sec_Fetch_Site="same-origin", host="evil.example:8081"), Act(), 403),
        (post(Sec_Fetch_Site="same-origin", host="127.0.0.1:8081"), Act(), 200),
        (post(host="evil.example"), Act(), 200),
        (post({"input": ["x", "y"]}, "/v1/embeddings"), Act(), 200),
        (post({"input": []}, "/v1/embeddings"), Act(), 400),
        (post({"query": "x"}, "/rerank"), Act(), 200),
        (post({"tokens": [1], "stream": True}, "/detokenize/"), Act(), 200),
        (post({"content": "x"}, "/v1/embeddings", origin="https://evil.example"), Act(), 403),
        (post(FORM, "/v1/audio/transcriptions", Content_Type="multipart/form-data; boundary=b"), Act(), 200),
        (post(b"--b", "/v1/audio/transcriptions", Content_Type="multipart/form-data; boundary=b"), Act(), 400),
        (post({"messages": []}, "/v1/messages"), Act(status=500, chunks=(b'{"error": {"message": "no"}}',)), 500),
        (post({"model": "b", "messages": []}, "/v1/messages/"), Act(), 404),
        (
            post({"messages": [], "stream": True}, "/v1/messages"),
            Act(chunks=(b"event: a\ndata: 1\n\n",), event_stream=True, loss=Loss.STOP, lost_after=1),
            200,
        ),
        (post(CHAT | {"stream": False}, "/api/chat"), Act(chunks=(OLLAMAS_WHOLE,)), 200),
        (post(CHAT, "/api/chat/"), Act(chunks=OLLAMAS_STREAM, event_stream=True), 200),
        (
            post(CHAT | {"model": "a:latest"}, "/api/chat"),
            Act(status=500, chunks=(b'{"error": {"message": "no"}}',)),
            500,
        ),
        (post(CHAT, "/api/chat"), Act(chunks=OLLAMAS_STREAM[:1], event_stream=True), 200),
        (post(CHAT | {"model": "b"}, "/api/chat"), Act(), 404),
        (post({"prompt": 3}, "/api/generate"), Act(), 400),
        (post({}, "/api/generate"), Act(), 200),
        (post({"keep_alive": 0}, "/api/generate"), Act(), 200),
        (post(b"{"), Act(), 400),
        (post({"model": "a"}), Act(), 400),
        (post(CHAT | {"model": "b"}, Origin=PAGE), Act(), 404),
        (post(Origin="http://n"), Act(), 200),
        (post(Origin="http://n", Sec_Fetch_Site="cross-site"), Act(), 403),
        (post(CHAT, x_priority="urgent"), Act(), 400),
        (post(CHAT | {"x": "y" * MAX_BYTES}), Act(), 413),
        (post(Content_Encoding="gzip"), Act(), 415),
        (post(), Act(loss=Loss.STOP), 503),
        (
            post(CHAT | {"stream": True}),
            Act(chunks=(b"data: 1\n\n",), event_stream=True, loss=Loss.STOP, lost_after=1),
            200,
        ),
        (post(), Act(chunks=(b"one",), loss=Loss.STOP, lost_after=1), 200),
    ],
)
async def test_both_roads_give_the_same_answer(request_: bytes, act: Act, status: int, nursery: trio.Nursery) -> None:
    answers = []
    sent = []
    for road in ALL_ROADS:
        with trio.fail_after(5):
            this = await start(nursery, road)
            this.node.servers.acts.append(act)
            line, headers, body = await this.ask(request_)
            this.assert_nothing_is_held()
        assert line.startswith(b"HTTP/1.1 %d" % status)
        assert re.fullmatch("[0-9a-f]{32}|mine", headers["x-request-id"])
        body = DIFFERING.sub(b"", whole(body)).replace(headers["x-request-id"].encode(), b"ID")
        if b"POST /api/" in request_:
            headers.pop("content-length", None)  # the durations have as many digits as they need
        answers.append((line, comparable(headers), body))
        sent.append([(one.path, one.headers, one.body) for one in this.node.servers.sent])
    assert answers == answers[:1] * len(ALL_ROADS)
    assert sent == sent[:1] * len(ALL_ROADS)
    assert {path for path, _headers, _body in sent[0]} <= set(ENDPOINTS)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({}, 401, "invalid_api_key"),
        ({"Authorization": "Bearer wrong"}, 401, "invalid_api_key"),
        ({"Authorization": "Basic alice"}, 401, "invalid_api_key"),
        ({"Authorization": "Bearer"}, 401, "invalid_api_key"),
        ({"x-api-key": "\xff"}, 401, "invalid_api_key"),
        ({"Authorization": "Bearer alice"}, 200, None),
        ({"Authorization": "bearer  alice "}, 200, None),
        ({"x-api-key": "alice"}, 200, None),
        ({"Authorization": "Bearer wrong", "x-api-key": "alice"}, 401, "invalid_api_key"),
        ({"Authorization": "Bearer token"}, 200, None),
        ({"Authorization": "Bearer other"}, 403, "model_forbidden"),
        ({"Authorization": "Bearer scraper"}, 403, "role_forbidden"),
        ({"Authorization": "Bearer used-up"}, 429, "insufficient_quota"),
        ({"Authorization": "Bearer wrong", "Origin": "https://evil.example"}, 403, "origin_forbidden"),
    ],
)
async def test_both_roads_ask_for_the_same_key(
    headers: dict[str, str], status: int, code: str | None, nursery: trio.Nursery
) -> None:
    answers = []
    for road in ALL_ROADS:
        this = await start(nursery, road, gate=gate_with_keys())
        with trio.fail_after(5):
            line, found, body = await this.ask(post(**cast(Any, headers)))
        this.assert_nothing_is_held()
        assert line.startswith(b"HTTP/1.1 %d" % status)
        assert ("www-authenticate" in found) == (status == 401)
        if code is not None:
            assert json.loads(body)["error"]["code"] == code
            assert this.node.servers.sent == [], "a refused request reached a server"
        answers.append((line, comparable(found), whole(body).replace(found["x-request-id"].encode(), b"ID")))
        sent = [name for one in this.node.servers.sent for name, _value in one.headers]
        assert not {b"authorization", b"x-api-key"} & set(sent), "the client's key reached the server"
    assert answers == answers[:1] * len(ALL_ROADS)
    nursery.cancel_scope.cancel()


def gate_with_keys() -> Gate:
    entries = [
        ApiKeyConfig(name="alice", sha256=digest_of("alice"), concurrent_requests=1),
        ApiKeyConfig(name="other", sha256=digest_of("other"), models=("b",)),
        ApiKeyConfig(name="scraper", sha256=digest_of("scraper"), roles=("metrics",)),
        ApiKeyConfig(name="used-up", sha256=digest_of("used-up"), tokens_per_day=1),
    ]
    gate = Gate("token", Path("/nonexistent"), {entry.sha256 or "": entry for entry in entries})
    gate.accounts[-1].count_tokens(1, 0)
    return gate


@pytest.mark.parametrize("road", ROADS)
async def test_a_key_is_refused_before_the_body_is_read_and_its_requests_at_once_are_counted(
    road: str, nursery: trio.Nursery
) -> None:
    this = await start(nursery, road, gate=gate_with_keys())
    this.node.servers.acts.append(Act(chunks=(b"data: 1\n\n",) * 1000, chunk_s=0.05, event_stream=True))
    key: Any = {"Authorization": "Bearer alice"}
    with trio.fail_after(5):
        async with await this.served.connect() as peer:
            await peer.send(post(CHAT | {"stream": True}, close=False, **key))
            await peer.until(b"data: 1")
            head, _, _body = post(**key).partition(b"\r\n\r\n")
            line, headers, body = await this.ask(head + b"\r\n\r\n")
            assert (line[:12], headers["retry-after"]) == (b"HTTP/1.1 429", "1")
            assert json.loads(body)["error"]["message"].startswith("The API key 'alice' is at its limit of 1")
        await trio.sleep(0.5)
        line, _headers, _body = await this.ask(post(**key))
        assert line.startswith(b"HTTP/1.1 200")
    this.assert_nothing_is_held()
    nursery.cancel_scope.cancel()


async def test_an_unknown_model_is_refused_before_its_body_has_arrived(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        this = await start(nursery, "fast")
        head, _, _body = post(b" " * (MAX_BYTES - 1), close=False).partition(b"\r\n\r\n")
        async with await this.served.connect() as peer:
            await peer.send(head + b'\r\n\r\n{"model": "missing", "messages": [')
            answer = await peer.rest()
        assert answer.startswith(b"HTTP/1.1 404")
        assert b"model_not_found" in answer
        async with await this.served.connect() as peer:
            await peer.send(head + b'\r\n\r\n{"model": "alias", "messages": [')
            with trio.move_on_after(0.2) as waits:
                await peer.rest()
            assert waits.cancelled_caught, "the rest of a body for a known model is waited for"
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ["fast", "fast by HTTP/2"])
@pytest.mark.parametrize("body", [CHAT | {"model": "missing"}, {"model": "a"}, b"{"], ids=["model", "field", "json"])
async def test_a_refused_body_is_freed_without_the_garbage_collector(
    body: Any, road: str, nursery: trio.Nursery
) -> None:
    with trio.fail_after(10):
        this = await start(nursery, road)
        await this.ask(post(body))
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            line, _headers, _body = await this.ask(post(body))
            await trio.sleep(0.05)
            gc.collect()
            kept = [it for it in gc.garbage if isinstance(it, RequestBody)]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
    assert line.startswith(b"HTTP/1.1 4")
    assert kept == []
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("status", [NodeStatus.READY, NodeStatus.STARTING, NodeStatus.DRAINING])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "target", ["/livez", "/healthz", "/readyz", "/readyz?drain=404", "/readyz?drain=1", "/health", "//v1/health/"]
)
async def test_both_roads_give_the_same_health(
    target: str, method: str, status: NodeStatus, nursery: trio.Nursery
) -> None:
    answers = []
    for road in ALL_ROADS:
        for more in ("", "Origin: https://evil.example\r\nSec-Fetch-Site: none\r\n"):
            this = await start(nursery, road)
            this.node.status = status
            with trio.fail_after(5):
                head = f"{method} {target} HTTP/1.1\r\nHost: evil.example\r\n{more}Connection: close\r\n\r\n"
                line, headers, body = await this.ask(head.encode())
            answers.append((line, comparable(headers), body.replace(headers["x-request-id"].encode(), b"ID")))
    assert answers == answers[:2] * len(ALL_ROADS)
    assert answers[1][0].startswith(b"HTTP/1.1 403"), "a foreign page under a foreign name"
    nursery.cancel_scope.cancel()


TOKEN = "Authorization: Bearer token\r\n"


@pytest.mark.parametrize("target", ["/v1/node/inventory", "/v1/node/queue", "/v1//node/inventory/?a=b"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("headers", "status", "for_operators"),
    [
        ("", 200, False),
        (TOKEN, 200, True),
        ("Authorization: Bearer toke\r\n", 200, False),
        ("Authorization: Bearer \xe4\r\n", 200, False),
        (f"{TOKEN}Origin: http://n\r\n", 200, True),
        (f"{TOKEN}Origin: http://n\r\nSec-Fetch-Site: same-origin\r\n", 200, True),
        (f"{TOKEN}Origin: {PAGE}\r\n", 200, False),
        (f"{TOKEN}Origin: http://n\r\nSec-Fetch-Site: cross-site\r\n", 200, False),
    ],
)
async def test_both_roads_give_the_same_looks_and_details_to_operators_alone(
    target: str, method: str, headers: str, status: int, for_operators: bool, nursery: trio.Nursery
) -> None:
    answers = []
    for road in ALL_ROADS:
        this = await start(nursery, road)
        with trio.fail_after(5):
            line, fields, body = await this.ask(
                f"{method} {target} HTTP/1.1\r\nHost: n\r\n{headers}Connection: close\r\n\r\n".encode("latin-1")
            )
        assert line.startswith(b"HTTP/1.1 %d" % status)
        assert "access-control-allow-origin" not in fields
        answers.append((line, comparable(fields), json.loads(body or b"{}")))
    assert answers == answers[:1] * len(ALL_ROADS)
    if method == "GET" and "inventory" in target:
        assert answers[0][2] == {"for_operators": for_operators}
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ROADS)
async def test_a_look_that_fails_is_a_500_and_logged(
    road: str, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    this = await start(nursery, road)
    this.node.status = NodeStatus.STOPPING
    with trio.fail_after(5):
        line, _headers, body = await this.ask(
            b"GET /v1/node/inventory HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n"
        )
    assert line.startswith(b"HTTP/1.1 500")
    assert json.loads(body)["error"]["code"] == "internal_error"
    assert "RuntimeError: a bug" in caplog.text
    nursery.cancel_scope.cancel()


def whole(body: bytes) -> bytes:
    """The body without the frames of its chunks, with a mark where its last chunk is missing."""
    if not re.match(rb"[0-9a-f]+\r\n", body):
        return body
    mark = b"" if body.endswith(b"\r\n0\r\n\r\n") else b"<truncated>"
    return re.sub(rb"(?:^|\r\n)[0-9a-f]+\r\n", b"", body).removesuffix(b"\r\n") + mark


@pytest.mark.parametrize(
    "act",
    [
        STREAM,
        Act(status=400, chunks=(b'{"error": {"message": "bad grammar"}}',)),
        Act(loss=Loss.STOP),
    ],
    ids=["answered", "refused by the server", "lost"],
)
async def test_both_roads_keep_the_line_of_a_waiting_stream_open(act: Act, nursery: trio.Nursery) -> None:
    answers = []
    for road in ALL_ROADS:
        with trio.fail_after(10):
            this = await start(nursery, road, stream_ping_s=0.1)
            this.node.servers.fake.load_s = 0.5
            this.node.servers.acts.append(act)
            line, headers, body = await this.ask(post(CHAT | {"stream": True}))
            this.assert_nothing_is_held()
        assert line.startswith(b"HTTP/1.1 200")
        assert (headers["content-type"], headers["x-node-id"]) == ("text/event-stream", "box-a")
        said = whole(body).replace(headers["x-request-id"].encode(), b"ID")
        assert said.startswith(b": loading a\n\n")
        # How many comments there are, and whether one comes later, depends on the machine.
        answers.append((line, comparable(headers), re.sub(rb"(?m)^: .*\n\n", b"", said)))
    assert answers == answers[:1] * len(ALL_ROADS)
    assert answers[0][2].rstrip().endswith(b"data: [DONE]" if act is STREAM else b"<truncated>")
    assert (b'data: {"error"' in answers[0][2]) == (act is not STREAM)
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ROADS)
async def test_a_client_that_leaves_while_its_stream_waits_gives_up_its_request(
    road: str, nursery: trio.Nursery
) -> None:
    with trio.fail_after(10):
        this = await start(nursery, road, stream_ping_s=0.1)
        this.node.servers.fake.load_s = 60.0
        async with await this.served.connect() as peer:
            await peer.send(post(CHAT | {"stream": True}, close=False))
            await peer.until(b": loading a")
            assert this.node.scheduler.admitted == 1
        for _ in range(500):
            await trio.sleep(0.01)
            if not this.node.scheduler.admitted:
                break
        this.assert_nothing_is_held()
        assert this.node.servers.sent == []
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ROADS)
async def test_requests_on_one_connection_are_answered_in_turn(road: str, nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        this = await start(nursery, road)
        requests = post(close=False) + b"GET /livez HTTP/1.1\r\nHost: n\r\n\r\n" + post(close=False) + post()
        answers = await this.served.ask(requests)
        assert len(re.findall(rb"HTTP/1.1 200", answers)) == 4
        assert [len(end) for end in re.findall(rb"choices|\"ok", answers)] == [7, 3, 7, 7]
        this.assert_nothing_is_held()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_gives_up_its_request(road: str, stream: bool, nursery: trio.Nursery) -> None:
    act = Act(chunks=(b"data: 1\n\n",) * 1000, chunk_s=0.05 if stream else 60.0, event_stream=stream)
    with trio.fail_after(5):
        this = await start(nursery, road)
        this.node.servers.acts.append(act)
        async with await this.served.connect() as peer:
            await peer.send(post(CHAT | {"stream": stream}, close=False))
            if stream:
                await peer.until(b"data: 1")
            else:
                await trio.sleep(0.1)
        await trio.sleep(1.0)
        this.assert_nothing_is_held()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ROADS)
async def test_a_client_that_waits_for_a_100_gets_it_unless_its_body_is_refused(
    road: str, nursery: trio.Nursery
) -> None:
    with trio.fail_after(5):
        this = await start(nursery, road)
        head, _, body = post(Expect="100-continue").partition(b"\r\n\r\n")
        async with await this.served.connect() as peer:
            await peer.send(head + b"\r\n\r\n")
            assert await peer.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            await peer.send(body)
            assert (await peer.rest()).startswith(b"HTTP/1.1 200")
        this.assert_nothing_is_held()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ROADS)
async def test_a_body_that_breaks_off_is_refused_and_its_request_given_up(road: str, nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        this = await start(nursery, road)
        async with await this.served.connect() as peer:
            await peer.send(post(close=False)[:-3])
            await peer.stream.send_eof()
            assert (await peer.rest()).startswith(b"HTTP/1.1 400")
        await trio.testing.wait_all_tasks_blocked()
        this.assert_nothing_is_held()
        assert this.node.servers.sent == []
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ROADS)
async def test_clients_that_announce_long_bodies_and_send_a_byte_shut_nobody_out(
    road: str, nursery: trio.Nursery
) -> None:
    announced = b"POST /v1/chat/completions HTTP/1.1\r\nHost: n\r\nContent-Length: %d\r\n\r\n{" % MAX_BYTES
    with trio.fail_after(10):
        this = await start(nursery, road)
        peers = [await this.served.connect() for _ in range(20)]
        for peer in peers:
            await peer.send(announced)
        await until(lambda: this.front.body_bytes_held == len(peers))
        status, _, _ = await this.ask(post())
        assert status.startswith(b"HTTP/1.1 200")
        for peer in peers:
            await peer.stream.aclose()
        await until(lambda: not this.front.body_bytes_held)
        this.assert_nothing_is_held()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ROADS)
async def test_the_slowest_body_makes_room_when_the_budget_is_full(road: str, nursery: trio.Nursery) -> None:
    begun = post(CHAT | {"x": "y" * (MAX_BYTES - 200)}, close=False)[:-100]
    with trio.fail_after(10):
        this = await start(nursery, road)  # the budget is four times MAX_BYTES
        async with await this.served.connect() as slowest:
            await slowest.send(begun)
            await until(lambda: this.front.body_bytes_held > 0)
            await trio.sleep(0.5)
            others = [await this.served.connect() for _ in range(3)]
            for peer in others:
                await peer.send(begun)
            await until(lambda: this.front.body_bytes_held > 4 * (MAX_BYTES - 400))
            status, _, _ = await this.ask(post(CHAT | {"x": "y" * (MAX_BYTES - 200)}))
            assert status.startswith(b"HTTP/1.1 200")
            refused = await slowest.rest()
            assert refused.startswith(b"HTTP/1.1 503")
            assert b"connection: close" in refused.lower()
            assert b"was arriving the slowest" in refused
            for peer in others:
                await peer.send(begun_rest(begun))
                assert (await peer.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
                await peer.stream.aclose()
        await trio.testing.wait_all_tasks_blocked()
        this.assert_nothing_is_held()
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize("road", ROADS)
async def test_a_body_that_is_malformed_from_its_first_byte_is_refused_and_logs_nothing(
    road: str, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: n\r\nTransfer-Encoding: chunked\r\n\r\n"
    with trio.fail_after(5):
        this = await start(nursery, road)
        status, _, _ = await this.ask(head + b"no size\r\n")
        assert status.startswith(b"HTTP/1.1 400")
        await trio.testing.wait_all_tasks_blocked()
        this.assert_nothing_is_held()
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - nothing tells of it
        await trio.sleep(0.01)


def begun_rest(begun: bytes) -> bytes:
    return post(CHAT | {"x": "y" * (MAX_BYTES - 200)}, close=False)[len(begun) :]


@pytest.mark.parametrize("road", ROADS)
async def test_a_bug_is_a_500_and_the_connection_goes_on(
    road: str, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(*_args: object) -> None:
        raise RuntimeError("a fault of ours")

    with trio.fail_after(5):
        this = await start(nursery, road)
        async with await this.served.connect() as peer:
            with monkeypatch.context() as patch:
                patch.setattr(Inference, "serve", fail)
                await peer.send(post(close=False))
                assert (await peer.until(b"}")).startswith(b"HTTP/1.1 500")
            await rest_of_error(peer)
            await peer.send(post(close=False))
            assert (await peer.until(b"choices")).startswith(b"HTTP/1.1 200")
        await trio.testing.wait_all_tasks_blocked()
        this.assert_nothing_is_held()
    assert "a fault of ours" in caplog.text
    nursery.cancel_scope.cancel()


async def rest_of_error(peer: Peer) -> None:
    await peer.until(b"}")


def test_only_posts_to_the_paths_of_inference_take_the_fast_road() -> None:
    node = cast(Node, SimpleNamespace())
    road = FastRoad(node, cast(Front, None), cast(Inference, None))
    for path in (b"/v1/completions", b"/v1//completions", b"/completions/"):
        assert road.find_handler("POST", path) is not None
    for method, path in [("GET", b"/v1/completions"), ("POST", b"/v1/%63ompletions"), ("POST", b"/v1/node/drain")]:
        assert road.find_handler(method, path) is None
