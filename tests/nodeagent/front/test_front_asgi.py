"""What each request gets before the application sees it, with Quart-Trio by real sockets, and bare in virtual time."""

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, cast

import httpx
import pytest
import trio
from quart import Response, request
from quart_trio import QuartTrio
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.serving import start_serving
from nodeagent.errors import BackendCrashed, ModelNotFound, QueueFull
from nodeagent.front.app import create_app
from nodeagent.front.asgi import Front, exit_stack, request_id
from nodeagent.front.seam import ModelCard, Node
from nodeagent.front.server import AbortResponse, ASGIApp
from nodeagent.logs import request_id_var
from nodeagent.status import NodeState, NodeStatus

MAX_BYTES = 1000
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Log:
    """What happened, in order, and what the handlers wait for."""

    def __init__(self) -> None:
        self.released: list[str] = []
        self.release_event = trio.Event()
        self.entered = trio.Event()
        self.go_on = trio.Event()

    def release(self) -> None:
        self.released.append(request_id())
        self.release_event.set()


def quart_app(log: Log) -> QuartTrio:
    """Handlers that end in every way; each owns something by the exit stack."""
    app = QuartTrio(__name__, static_folder=None)
    app.config.update(RESPONSE_TIMEOUT=None, BODY_TIMEOUT=None, PROPAGATE_EXCEPTIONS=True)

    @app.before_request
    async def own() -> None:
        exit_stack().callback(log.release)

    @app.get("/id")
    async def identity() -> str:
        assert request.scope["nodeagent.request_id"] == request_id() == request_id_var.get()  # type: ignore[typeddict-item]
        assert request.scope["nodeagent.exit_stack"] is exit_stack()  # type: ignore[typeddict-item]
        return request_id()

    @app.post("/length")
    async def length() -> str:
        return str(len(await request.get_data()))

    @app.post("/held")
    async def held() -> str:
        await request.get_data()
        log.entered.set()
        await log.go_on.wait()
        return "done"

    @app.get("/wait")
    async def wait() -> str:
        log.entered.set()
        await trio.sleep_forever()
        raise AssertionError

    @app.get("/fault")
    async def fault() -> str:
        raise ValueError("a fault of ours")

    @app.get("/refused")
    async def refused() -> str:
        async with trio.open_nursery():
            raise QueueFull("m", 2, 1.5)

    @app.get("/stream/<end>")
    async def stream(end: str) -> Response:
        return Response(_chunks(log, end))

    return app


async def _chunks(log: Log, end: str) -> AsyncIterator[bytes]:
    yield b"first"
    log.entered.set()
    if end == "abort":
        raise AbortResponse("on purpose")
    if end == "fault":
        raise ValueError("a fault of ours")
    if end == "refusal":
        raise BackendCrashed("m", "gpu:0", "signal 9")
    await trio.sleep_forever()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
async def client(nursery: trio.Nursery, log: Log) -> AsyncIterator[httpx.AsyncClient]:
    front = Front(quart_app(log), max_request_bytes=MAX_BYTES, body_budget_bytes=2 * MAX_BYTES)
    served = await start_serving(nursery, front)
    async with httpx.AsyncClient(base_url=served.url, timeout=5) as client:
        yield client


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("method", "path", "headers", "content", "status"),
    [
        ("GET", "/id", {}, b"", 200),
        ("GET", "/nowhere", {}, b"", 404),
        ("DELETE", "/id", {}, b"", 405),
        ("GET", "/refused", {}, b"", 429),
        ("GET", "/fault", {}, b"", 500),
        ("POST", "/length", {}, b"x" * (MAX_BYTES + 1), 413),
        ("POST", "/length", {"content-encoding": "gzip"}, b"x", 415),
    ],
)
async def test_every_answer_carries_the_requests_id(
    method: str, path: str, headers: dict[str, str], content: bytes, status: int, client: httpx.AsyncClient
) -> None:
    given = {**headers, "x-request-id": "Client.1:a_b-c"}
    answer = await client.request(method, path, headers=given, content=content)
    assert (answer.status_code, answer.headers.get_list("x-request-id")) == (status, ["Client.1:a_b-c"])
    answer = await client.request(method, path, headers=headers, content=content)
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize("given", ["a", "x" * 128, "A-1.b_2:c"])
async def test_a_clients_own_request_id_is_kept(given: str, client: httpx.AsyncClient) -> None:
    answer = await client.get("/id", headers={"x-request-id": given})
    assert answer.headers["x-request-id"] == answer.text == given


@pytest.mark.parametrize("given", ["", "x" * 129, "a b", "a\tb", 'a"', "ä", "a,b"])
async def test_an_unfit_request_id_is_replaced(given: str, client: httpx.AsyncClient) -> None:
    answer = await client.get("/id", headers=[(b"x-request-id", given.encode("latin-1"))])
    assert answer.headers["x-request-id"] == answer.text
    assert len(answer.text) == 32


async def test_outside_of_a_request_there_is_no_id_and_no_stack() -> None:
    assert request_id() == ""
    with pytest.raises(LookupError):
        exit_stack()


@pytest.mark.parametrize("path", ["/id", "/nowhere", "/refused", "/fault"])
async def test_the_exit_stack_closes_with_the_request(path: str, client: httpx.AsyncClient, log: Log) -> None:
    answer = await client.get(path)
    assert log.released == [answer.headers["x-request-id"]]


@pytest.mark.parametrize("declared", [False, True])
async def test_the_exit_stack_closes_before_the_client_can_have_the_whole_answer(declared: bool) -> None:
    order: list[str] = []

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        exit_stack().callback(order.append, "closed")
        headers = [(b"content-length", b"8")] if declared else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        order.append("half")
        await send({"type": "http.response.body", "body": b"full", "more_body": declared})
        order.append("full")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    await Exchange().through(app)
    assert order == ["half", "closed", "full"]


@pytest.mark.parametrize("end", ["abort", "fault", "refusal"])
async def test_the_exit_stack_closes_when_a_stream_breaks(end: str, client: httpx.AsyncClient, log: Log) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await client.get(f"/stream/{end}")
    with trio.fail_after(1):
        await log.release_event.wait()
    assert len(log.released) == 1


@pytest.mark.parametrize("path", ["/wait", "/stream/never"])
async def test_the_exit_stack_closes_when_the_client_leaves(path: str, client: httpx.AsyncClient, log: Log) -> None:
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.get, path)
            await log.entered.wait()
            assert log.released == []
            nursery.cancel_scope.cancel()
        with trio.fail_after(1):
            await log.release_event.wait()


async def test_a_refusal_is_answered_with_its_status(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await client.get("/refused")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
    assert answer.json()["error"]["code"] == "queue_full"
    assert warnings(caplog) == []


async def test_a_fault_of_ours_is_logged_once_and_told_by_its_id_alone(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    answer = await client.get("/fault")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "a fault of ours" not in answer.text
    [record] = warnings(caplog)
    assert answer.headers["x-request-id"] in answer.json()["error"]["message"]
    assert answer.headers["x-request-id"] in record.getMessage()
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


@pytest.mark.parametrize(("end", "level"), [("abort", None), ("refusal", "WARNING"), ("fault", "ERROR")])
async def test_a_broken_stream_is_logged_once_unless_broken_on_purpose(
    end: str, level: str | None, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await client.get(f"/stream/{end}")
    assert [record.levelname for record in warnings(caplog)] == ([] if level is None else [level])


@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "x"])
async def test_an_encoded_body_is_refused(encoding: str, client: httpx.AsyncClient) -> None:
    answer = await client.post("/length", content=b"abc", headers={"content-encoding": encoding})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
async def test_a_body_that_is_as_it_is_may_say_so(encoding: str, client: httpx.AsyncClient) -> None:
    answer = await client.post("/length", content=b"abc", headers={"content-encoding": encoding})
    assert answer.text == "3"


def _in_pieces(total: int, piece: int = 100) -> Iterator[bytes]:
    for start in range(0, total, piece):
        yield bytes(min(piece, total - start))


async def _chunked(total: int) -> AsyncIterator[bytes]:
    for piece in _in_pieces(total):
        yield piece


@pytest.mark.parametrize("chunked", [False, True])
async def test_the_longest_body_is_taken_and_one_byte_more_is_not(chunked: bool, client: httpx.AsyncClient) -> None:
    async def post(size: int) -> httpx.Response:
        return await client.post("/length", content=_chunked(size) if chunked else bytes(size))

    assert (await post(MAX_BYTES)).text == str(MAX_BYTES)
    refused = await post(MAX_BYTES + 1)
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    assert refused.headers["connection"] == "close"
    assert (await post(MAX_BYTES)).text == str(MAX_BYTES)


async def test_a_body_that_is_too_large_is_refused_to_a_client_that_is_still_sending(client: httpx.AsyncClient) -> None:
    answer = await client.post("/length", content=bytes(2**24))
    assert answer.status_code == 413


@pytest.mark.parametrize("chunked", [False, True])
async def test_bodies_held_are_bounded_together(chunked: bool, nursery: trio.Nursery, log: Log) -> None:
    front = Front(quart_app(log), max_request_bytes=MAX_BYTES, body_budget_bytes=2 * MAX_BYTES)
    with trio.fail_after(5):
        served = await start_serving(nursery, front)
        async with httpx.AsyncClient(base_url=served.url) as client, trio.open_nursery() as holders:

            def body() -> Any:
                return _chunked(MAX_BYTES) if chunked else bytes(MAX_BYTES)

            holders.start_soon(lambda: client.post("/held", content=body()))
            await log.entered.wait()
            log.entered = trio.Event()
            holders.start_soon(lambda: client.post("/held", content=body()))
            await log.entered.wait()
            assert front.body_bytes_held == 2 * MAX_BYTES
            refused = await client.post("/length", content=body())
            assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
            assert refused.json()["error"]["code"] == "server_busy"
            assert (await client.get("/id")).status_code == 200
            log.go_on.set()
        async with httpx.AsyncClient(base_url=served.url) as client:
            assert (await client.post("/length", content=body())).text == str(MAX_BYTES)
        served.shutdown.set()
        await served.ended.wait()
    assert front.body_bytes_held == 0


async def test_a_body_that_does_not_fit_is_refused_before_it_is_read(nursery: trio.Nursery, log: Log) -> None:
    front = Front(quart_app(log), max_request_bytes=MAX_BYTES, body_budget_bytes=MAX_BYTES)
    announced = b"POST /held HTTP/1.1\r\nHost: n\r\nContent-Length: 600\r\n\r\n"
    with trio.fail_after(5):
        served = await start_serving(nursery, front)
        async with await served.connect() as first, await served.connect() as second:
            await first.send(announced)
            await wait_all_tasks_blocked()
            assert front.body_bytes_held == 600
            await second.send(announced)
            assert (await second.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 503")
        served.shutdown.set()
        await served.ended.wait()
    assert front.body_bytes_held == 0


# Without a server: the wrapper alone, where time is virtual.


class Exchange:
    """One request as ASGI messages. `receive` gives what was fed to it, then blocks."""

    def __init__(self, *headers: tuple[bytes, bytes], kind: str = "http") -> None:
        self.scope: dict[str, Any] = {"type": kind, "method": "POST", "path": "/", "headers": list(headers)}
        self.sent: list[dict[str, Any]] = []
        self.feed, self._from_client = trio.open_memory_channel[dict[str, Any]](100)

    async def receive(self) -> dict[str, Any]:
        return await self._from_client.receive()

    async def send(self, message: Any) -> None:
        self.sent.append(dict(message))

    def body(self, data: bytes, *, more: bool = True) -> None:
        self.feed.send_nowait({"type": "http.request", "body": data, "more_body": more})

    async def through(self, app: ASGIApp, **options: Any) -> None:
        await Front(app, **{"max_request_bytes": 2**30, **options})(self.scope, self.receive, self.send)

    def error(self) -> tuple[int, str]:
        start, body = self.sent
        return start["status"], json.loads(body["body"])["error"]["code"]


async def read_all(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    while (await receive())["more_body"]:
        continue
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


LONG = (b"content-length", b"%d" % 2**28)


async def test_a_body_that_does_not_come_is_given_up_after_a_minute(autojump_clock: MockClock) -> None:
    exchange = Exchange(LONG)
    with trio.fail_after(3600):
        await exchange.through(read_all)
    assert exchange.error() == (408, "request_timeout")
    assert trio.current_time() == pytest.approx(60)


async def test_a_body_that_drips_is_given_up_too(autojump_clock: MockClock) -> None:
    exchange = Exchange(LONG)

    async def drip() -> None:
        while True:
            exchange.body(b"x")
            await trio.sleep(5)

    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drip)
        with trio.fail_after(3600):
            await exchange.through(read_all)
        nursery.cancel_scope.cancel()
    assert exchange.error() == (408, "request_timeout")
    assert trio.current_time() - begun == pytest.approx(60, abs=1)


async def test_a_long_body_on_a_slow_line_is_taken(autojump_clock: MockClock) -> None:
    exchange = Exchange(LONG)

    async def upload() -> None:
        for _ in range(60):
            exchange.body(bytes(2**20))
            await trio.sleep(30)
        exchange.body(b"", more=False)

    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(upload)
        await exchange.through(read_all)
    assert exchange.sent[0]["status"] == 200
    assert trio.current_time() - begun == pytest.approx(1800)


async def test_an_answer_may_take_as_long_as_it_takes(autojump_clock: MockClock) -> None:
    async def slow(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        assert (await receive())["body"] == b"all"
        with trio.move_on_after(7200):
            await receive()
        await read_all_after(send)

    async def read_all_after(send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    exchange = Exchange((b"content-length", b"3"))
    exchange.body(b"all", more=False)
    await exchange.through(slow)
    assert exchange.sent[0]["status"] == 200
    assert trio.current_time() >= 7200


class BareNode:
    """What `create_app` needs of a node whose own routes nobody asks."""

    node_id = "box-a"
    max_request_bytes = MAX_BYTES
    scheduler: Any = None

    def cards(self) -> list[ModelCard]:
        return []

    def state(self) -> NodeState:
        return NodeState(NodeStatus.READY, (), can_serve=True)

    def inventory_json(self) -> bytes:
        return b"{}"


async def test_a_stream_of_the_real_application_may_last_for_hours(autojump_clock: MockClock) -> None:
    app = create_app(cast(Node, BareNode()))

    @app.get("/hours")
    async def hours() -> Response:
        return Response(chunks())

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(3):
            yield b"chunk"
            await trio.sleep(3600)

    exchange = Exchange()
    rest = {"method": "GET", "scheme": "http", "http_version": "1.1", "query_string": b"", "root_path": ""}
    exchange.scope.update(rest, path="/hours", raw_path=b"/hours", client=("127.0.0.1", 1), extensions={})
    await exchange.through(app)
    assert [message.get("body") for message in exchange.sent[1:]] == [b"chunk", b"chunk", b"chunk", b""]
    assert trio.current_time() >= 3 * 3600


async def test_a_cancellation_passes_through_and_the_stack_closes() -> None:
    closed: list[str] = []

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        exit_stack().callback(closed.append, "stack")
        await trio.sleep_forever()

    exchange = Exchange()
    with trio.move_on_after(0.01) as scope:
        await exchange.through(app)
    assert scope.cancelled_caught
    assert (closed, exchange.sent) == (["stack"], [])


async def test_a_cancellation_beside_a_fault_passes_through_too(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("a fault while being cancelled")

    with trio.move_on_after(0.01) as scope:
        await Exchange().through(app)
    assert scope.cancelled_caught
    assert len(warnings(caplog)) == 1


async def test_an_application_that_answers_nothing_is_a_fault_of_ours() -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        pass

    exchange = Exchange()
    await exchange.through(app)
    assert exchange.error() == (500, "internal_error")


async def test_no_answer_is_due_to_a_client_that_left(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"

    exchange = Exchange()
    exchange.feed.send_nowait({"type": "http.disconnect"})
    await exchange.through(app)
    assert (exchange.sent, warnings(caplog)) == ([], [])


async def test_a_callback_that_fails_is_a_fault_of_ours(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("a fault of ours")

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        exit_stack().callback(fail)
        raise ModelNotFound("m", [])

    exchange = Exchange()
    await exchange.through(app)
    assert exchange.error() == (500, "internal_error")
    assert len(warnings(caplog)) == 1


async def test_websockets_are_refused() -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        raise AssertionError("the application is not asked")

    exchange = Exchange(kind="websocket")
    await exchange.through(app)
    assert [message["type"] for message in exchange.sent] == ["websocket.close"]


async def test_the_lifespan_is_the_applications_own() -> None:
    scopes = []

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        scopes.append(scope)

    exchange = Exchange(kind="lifespan")
    await exchange.through(app)
    assert scopes == [exchange.scope]
