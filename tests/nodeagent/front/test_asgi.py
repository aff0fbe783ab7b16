"""The wrapper around the application alone, mostly in virtual time."""

import logging
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from fakes.asgi import Exchange, Receive, Send, read_all
from nodeagent.errors import ModelNotFound
from nodeagent.front.asgi import releases, request_id


def warnings(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [record for record in caplog.records if record.levelno >= logging.WARNING]


LONG = (b"content-length", b"%d" % 2**28)


async def test_reading_a_body_that_does_not_arrive_times_out_after_a_minute(autojump_clock: MockClock) -> None:
    exchange = Exchange(LONG)
    with trio.fail_after(3600):
        await exchange.through(read_all)
    assert exchange.error() == (408, "request_timeout")
    assert trio.current_time() == pytest.approx(60)


async def test_reading_a_body_that_drips_times_out_too(autojump_clock: MockClock) -> None:
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


async def test_a_long_body_on_a_slow_line_is_accepted(autojump_clock: MockClock) -> None:
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


async def test_a_cancellation_passes_through_and_the_stack_closes(autojump_clock: MockClock) -> None:
    closed: list[str] = []

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        releases().add(closed.append, "stack")
        await trio.sleep_forever()

    exchange = Exchange()
    with trio.move_on_after(0.01) as scope:
        await exchange.through(app)
    assert scope.cancelled_caught
    assert (closed, exchange.sent) == (["stack"], [])


async def test_a_cancellation_beside_a_fault_passes_through_too(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
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


async def test_an_application_that_sends_no_answer_is_an_internal_error() -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        pass

    exchange = Exchange()
    await exchange.through(app)
    assert exchange.error() == (500, "internal_error")


async def test_a_client_that_left_is_owed_no_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        assert (await receive())["type"] == "http.disconnect"

    exchange = Exchange()
    exchange.feed.send_nowait({"type": "http.disconnect"})
    await exchange.through(app)
    assert (exchange.sent, warnings(caplog)) == ([], [])


async def test_a_callback_that_fails_is_an_internal_error(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> None:
        raise ValueError("a fault of ours")

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        releases().add(fail)
        raise ModelNotFound("m", [])

    exchange = Exchange()
    await exchange.through(app)
    assert exchange.error() == (500, "internal_error")
    assert len(warnings(caplog)) == 1


async def test_websockets_are_refused() -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        raise AssertionError("the application was called")

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


async def test_outside_of_a_request_there_is_no_id_and_no_stack() -> None:
    assert request_id() == ""
    with pytest.raises(LookupError):
        releases()


@pytest.mark.parametrize("declared", [False, True])
async def test_what_it_holds_is_released_before_the_client_can_have_the_whole_answer(declared: bool) -> None:
    order: list[str] = []

    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        releases().add(order.append, "closed")
        headers = [(b"content-length", b"8")] if declared else []
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})
        order.append("half")
        await send({"type": "http.response.body", "body": b"full", "more_body": declared})
        order.append("full")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    await Exchange().through(app)
    assert order == ["half", "closed", "full"]
