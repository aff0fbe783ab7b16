"""The client in virtual time, over a transport that is a table."""

import itertools
import json
import logging
import random
from collections.abc import Callable
from typing import Any

import httpx
import pytest
import trio
from trio.testing import MockClock

from fakes.node_source import FakeNodeSource
from nodeagent.dispatcher.client import DispatcherClient, loopback_warning

Answer = Callable[[str, int], httpx.Response]


class Dispatcher(httpx.AsyncBaseTransport):
    """Answers each call as told, `takes_s` later, and remembers when which came."""

    def __init__(self, answer: Answer, takes_s: float = 0.0) -> None:
        self.answer = answer
        self.takes_s = takes_s
        self.calls: list[tuple[str, float]] = []
        self.bodies: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.under_way = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert self.under_way == 0, "two calls at a time"
        self.under_way += 1
        try:
            what = request.url.path.rpartition("/")[2]
            self.calls.append((what, trio.current_time()))
            self.bodies.append(json.loads(await request.aread()))
            self.tokens.append(request.headers.get("authorization"))
            await trio.sleep(self.takes_s)
            return self.answer(what, len(self.calls))
        finally:
            self.under_way -= 1

    def times(self, what: str) -> list[float]:
        return [round(at, 3) for call, at in self.calls if call == what]


def ok(_what: str, _number: int) -> httpx.Response:
    return httpx.Response(200)


def client_of(dispatcher: Dispatcher, token: str | None = None) -> DispatcherClient:
    return DispatcherClient(
        "http://dispatcher:9000/",
        token=token,
        node=FakeNodeSource(),
        heartbeat_interval_s=10,
        transport=dispatcher,
        rng=random.Random(1),
    )


async def run_for(client: DispatcherClient, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await client.run()


async def test_it_registers_and_then_sends_a_heartbeat_each_interval(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(ok)
    await run_for(client_of(dispatcher, token="t"), 35)
    assert dispatcher.times("register") == [0]
    assert dispatcher.times("heartbeat") == [0, 10, 20, 30]
    assert [body["sequence"] for body in dispatcher.bodies[1:]] == [1, 2, 3, 4]
    assert set(dispatcher.tokens) == {"Bearer t"}


async def test_the_dispatcher_may_name_another_interval(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(lambda what, _number: httpx.Response(200, json={"heartbeat_interval_s": 3}))
    await run_for(client_of(dispatcher), 10)
    assert dispatcher.times("heartbeat") == [0, 3, 6, 9]


async def test_changes_are_told_soon_together_and_at_most_five_times_a_second(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(ok)
    client = client_of(dispatcher)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_for, client, 3.5)
        await trio.sleep(2)
        client.heartbeat_soon()
        client.heartbeat_soon()
        await trio.sleep(0.15)
        assert dispatcher.times("heartbeat") == [0, 2.1]
        for _ in range(100):
            client.heartbeat_soon()
            await trio.sleep(0.01)
    told = dispatcher.times("heartbeat")[1:]
    assert all(later - earlier >= 0.2 - 1e-9 for earlier, later in itertools.pairwise(told))
    assert 5 <= len(told) <= 8


async def test_a_registration_can_be_repeated_without_waiting_for_the_interval(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(ok)
    client = client_of(dispatcher)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_for, client, 9.0)
        await trio.sleep(2)
        client.register_again()
        await trio.sleep(2)
    assert dispatcher.times("register") == [0, 2.1]
    assert dispatcher.times("heartbeat") == [0, 2.1]
    assert [body.get("sequence") for body in dispatcher.bodies] == [None, 1, None, 2]


async def test_a_failed_heartbeat_is_repeated_with_the_next_sequence_and_no_registration(
    autojump_clock: MockClock,
) -> None:
    dispatcher = Dispatcher(lambda _what, number: httpx.Response(500 if number in (3, 4) else 200))
    await run_for(client_of(dispatcher), 25)
    assert dispatcher.times("register") == [0]
    sequences = [body["sequence"] for body in dispatcher.bodies[1:]]
    assert sequences == list(range(1, len(sequences) + 1))
    assert len(sequences) >= 5


async def test_retry_after_is_waited_for(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(
        lambda _what, number: httpx.Response(503, headers={"retry-after": "7"}) if number == 1 else httpx.Response(200)
    )
    await run_for(client_of(dispatcher), 9)
    assert dispatcher.times("register") == [0, 7]


async def test_a_dispatcher_that_forgot_the_node_gets_a_registration_but_one_an_interval_at_most(
    autojump_clock: MockClock,
) -> None:
    dispatcher = Dispatcher(lambda what, _number: httpx.Response(404 if what == "heartbeat" else 200))
    await run_for(client_of(dispatcher), 45)
    registered = dispatcher.times("register")
    assert len(registered) == 5
    assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(registered))


async def test_failures_are_retried_ever_more_slowly_logged_once_and_its_return_too(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    dispatcher = Dispatcher(lambda what, number: httpx.Response(500 if 3 <= number <= 12 else 200))
    await run_for(client_of(dispatcher), 600)
    messages = [record.getMessage() for record in caplog.records if record.name.startswith("nodeagent")]
    assert [message.split(": ", 1)[1] for message in messages] == [
        "registered",
        "responded with 500; requests are still served",
        "back",
    ]


async def test_a_dispatcher_that_hangs_costs_one_call_at_a_time_and_five_seconds_each(
    autojump_clock: MockClock,
) -> None:
    dispatcher = Dispatcher(ok, takes_s=1000)
    client = client_of(dispatcher)
    await run_for(client, 30)
    assert len(dispatcher.calls) <= 6
    assert client.problem == "no complete response within 5 s"


async def test_an_answer_that_is_too_long_is_no_answer(autojump_clock: MockClock) -> None:
    client = client_of(Dispatcher(lambda _what, _number: httpx.Response(200, content=b" " * 70_000)))
    await run_for(client, 1)
    assert client.problem == "response is longer than 65536 bytes"


async def test_redirects_are_not_followed(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(lambda _what, _number: httpx.Response(307, headers={"location": "http://elsewhere/"}))
    client = client_of(dispatcher)
    await run_for(client, 0.2)
    assert client.problem == "responded with 307"
    assert {call for call, _at in dispatcher.calls} == {"register"}


async def test_a_wrong_token_is_an_error_in_the_log_once(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    await run_for(client_of(Dispatcher(lambda _what, _number: httpx.Response(401)), token="secret"), 300)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "secret" not in caplog.text


async def test_stopping_sends_one_last_heartbeat_within_a_second(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(ok)
    client = client_of(dispatcher)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        await trio.sleep(5)
        dispatcher.takes_s = 1000
        await client.stop()
        assert trio.current_time() == pytest.approx(6)
    assert dispatcher.times("heartbeat") == [0, 5]


async def test_stopping_sends_nothing_to_a_dispatcher_that_does_not_know_the_node(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(lambda _what, _number: httpx.Response(500))
    client = client_of(dispatcher)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run)
        await trio.sleep(5)
        calls = len(dispatcher.calls)
        await client.stop()
    assert len(dispatcher.calls) == calls


@pytest.mark.parametrize(
    ("base_url", "dispatcher", "warned"),
    [
        ("http://127.0.0.1:8081", "http://10.0.0.1:9000", True),
        ("http://localhost:8081", "http://mesh:9000", True),
        ("http://[::1]:8081", "http://mesh:9000", True),
        ("http://127.0.0.1:8081", "http://localhost:9000", False),
        ("http://10.0.0.2:8081", "http://10.0.0.1:9000", False),
    ],
)
def test_a_node_on_loopback_is_no_use_to_a_dispatcher_elsewhere(base_url: str, dispatcher: str, warned: bool) -> None:
    assert (loopback_warning(base_url, dispatcher) is not None) == warned
