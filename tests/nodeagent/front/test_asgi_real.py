"""What each request gets before the application handles it, with Quart-Trio and real sockets."""

import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import trio
from quart import Response, request
from quart_trio import QuartTrio

from fakes.serving import start_serving
from nodeagent.errors import BackendCrashed, QueueFull
from nodeagent.front.asgi import Front, on_half_close, releases, request_id
from nodeagent.front.half_close import HalfClose
from nodeagent.front.server import AbortResponse
from nodeagent.logs import request_id_var

MAX_BYTES = 1000


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
    """Handlers that end in every way; each holds something."""
    app = QuartTrio(__name__, static_folder=None)
    app.config.update(RESPONSE_TIMEOUT=None, BODY_TIMEOUT=None, PROPAGATE_EXCEPTIONS=True)

    @app.before_request
    async def own() -> None:
        releases().add(log.release)
        on_half_close(HalfClose.GRACE)

    @app.get("/id")
    async def identity() -> str:
        assert request.scope["nodeagent.request_id"] == request_id() == request_id_var.get()  # type: ignore[typeddict-item]
        assert request.scope["nodeagent.releases"] is releases()  # type: ignore[typeddict-item]
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
async def test_an_invalid_request_id_is_replaced(given: str, client: httpx.AsyncClient) -> None:
    answer = await client.get("/id", headers=[(b"x-request-id", given.encode("latin-1"))])
    assert answer.headers["x-request-id"] == answer.text
    assert len(answer.text) == 32


@pytest.mark.parametrize("path", ["/id", "/nowhere", "/refused", "/fault"])
async def test_what_it_holds_is_released_with_the_request(path: str, client: httpx.AsyncClient, log: Log) -> None:
    answer = await client.get(path)
    assert log.released == [answer.headers["x-request-id"]]


@pytest.mark.parametrize("end", ["abort", "fault", "refusal"])
async def test_what_it_holds_is_released_when_a_stream_breaks(end: str, client: httpx.AsyncClient, log: Log) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await client.get(f"/stream/{end}")
    with trio.fail_after(1):
        await log.release_event.wait()
    assert len(log.released) == 1


@pytest.mark.parametrize("path", ["/wait", "/stream/never"])
async def test_what_it_holds_is_released_when_the_client_leaves(path: str, client: httpx.AsyncClient, log: Log) -> None:
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


async def test_an_unexpected_exception_is_logged_once_and_the_client_gets_only_the_requests_id(
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
async def test_a_compressed_body_is_refused(encoding: str, client: httpx.AsyncClient) -> None:
    answer = await client.post("/length", content=b"abc", headers={"content-encoding": encoding})
    assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_encoding")


@pytest.mark.parametrize("encoding", ["identity", "Identity", ""])
async def test_a_body_may_declare_that_it_is_not_compressed(encoding: str, client: httpx.AsyncClient) -> None:
    answer = await client.post("/length", content=b"abc", headers={"content-encoding": encoding})
    assert answer.text == "3"


def _in_pieces(total: int, piece: int = 100) -> Iterator[bytes]:
    for start in range(0, total, piece):
        yield bytes(min(piece, total - start))


async def _chunked(total: int) -> AsyncIterator[bytes]:
    for piece in _in_pieces(total):
        yield piece


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_at_the_limit_is_accepted_but_not_one_byte_more(chunked: bool, client: httpx.AsyncClient) -> None:
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
async def test_the_bodies_of_all_requests_are_bounded_together(chunked: bool, nursery: trio.Nursery, log: Log) -> None:
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


async def test_a_body_that_can_not_fit_is_refused_before_it_is_read(nursery: trio.Nursery, log: Log) -> None:
    front = Front(quart_app(log), max_request_bytes=MAX_BYTES, body_budget_bytes=MAX_BYTES)
    announced = b"POST /held HTTP/1.1\r\nHost: n\r\nContent-Length: 600\r\n\r\n"
    with trio.fail_after(5):
        served = await start_serving(nursery, front)
        async with await served.connect() as first, await served.connect() as second:
            await first.send(announced + bytes(600))
            await log.entered.wait()
            assert front.body_bytes_held == 600
            await second.send(announced)
            assert (await second.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 503")
            log.go_on.set()
            assert (await first.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        served.shutdown.set()
        await served.ended.wait()
    assert front.body_bytes_held == 0
