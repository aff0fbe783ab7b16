"""The client in virtual time, against a dispatcher that is a fake transport."""

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

Respond = Callable[[str, int], httpx.Response]


class Dispatcher(httpx.AsyncBaseTransport):
    """Responds to each call as `respond` says (by path and number of the call), `takes_s` later; remembers each."""

    def __init__(self, respond: Respond, takes_s: float = 0.0) -> None:
        self.respond = respond
        self.takes_s = takes_s
        self.calls: list[tuple[str, float]] = []
        self.bodies: list[dict[str, Any]] = []
        self.tokens: list[str | None] = []
        self.calls_in_progress = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert self.calls_in_progress == 0, "two calls at the same time"
        self.calls_in_progress += 1
        try:
            what = request.url.path.rpartition("/")[2]
            self.calls.append((what, trio.current_time()))
            self.bodies.append(json.loads(await request.aread()))
            self.tokens.append(request.headers.get("authorization"))
            await trio.sleep(self.takes_s)
            return self.respond(what, len(self.calls))
        finally:
            self.calls_in_progress -= 1

    def times(self, what: str) -> list[float]:
        return [round(at, 3) for call, at in self.calls if call == what]


def ok(_what: str, _number: int) -> httpx.Response:
    return httpx.Response(200)


def client_of(dispatcher: Dispatcher, token: str | None = None, rng: random.Random | None = None) -> DispatcherClient:
    return DispatcherClient(
        "http://dispatcher:9000/",
        token=token,
        node=FakeNodeSource(),
        heartbeat_interval_s=10,
        transport=dispatcher,
        rng=rng or random.Random(1),
    )


async def run_for(client: DispatcherClient, seconds: float) -> None:
    with trio.move_on_after(seconds):
        await client.run()


async def test_the_client_registers_and_then_sends_a_heartbeat_each_interval(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(ok)
    await run_for(client_of(dispatcher, token="t"), 35)
    assert dispatcher.times("register") == [0]
    assert dispatcher.times("heartbeat") == [0, 10, 20, 30]
    assert [body["sequence"] for body in dispatcher.bodies[1:]] == [1, 2, 3, 4]
    assert set(dispatcher.tokens) == {"Bearer t"}


async def test_the_dispatcher_can_set_the_interval(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(lambda what, _number: httpx.Response(200, json={"heartbeat_interval_s": 3}))
    await run_for(client_of(dispatcher), 10)
    assert dispatcher.times("heartbeat") == [0, 3, 6, 9]


async def test_a_change_brings_a_heartbeat_within_100_ms_and_many_changes_five_a_second(
    autojump_clock: MockClock,
) -> None:
    dispatcher = Dispatcher(ok)
    client = client_of(dispatcher)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_for, client, 3.5, name="client")
        await trio.sleep(2)
        client.heartbeat_soon()
        client.heartbeat_soon()
        await trio.sleep(0.15)
        assert dispatcher.times("heartbeat") == [0, 2.1]
        for _ in range(100):
            client.heartbeat_soon()
            await trio.sleep(0.01)
    times = dispatcher.times("heartbeat")[1:]
    assert all(later - earlier >= 0.2 - 1e-9 for earlier, later in itertools.pairwise(times))
    assert 5 <= len(times) <= 8


async def test_a_registration_can_be_repeated_without_waiting_for_the_interval(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(ok)
    client = client_of(dispatcher)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run_for, client, 9.0, name="client")
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


class LongestWait(random.Random):
    """Every back-off is as long as it can be."""

    def uniform(self, a: float, b: float) -> float:
        return b


async def test_the_back_off_doubles_with_each_failure_and_starts_anew_after_a_success(
    autojump_clock: MockClock,
) -> None:
    dispatcher = Dispatcher(lambda _what, number: httpx.Response(200 if number in (5, 6) else 500))
    client = client_of(dispatcher, rng=LongestWait())
    await run_for(client, 30)
    assert dispatcher.times("register") == [0, 1, 3, 7, 15]
    assert dispatcher.times("heartbeat") == [15, 25, 26, 28]


async def test_retry_after_is_waited_for(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(
        lambda _what, number: httpx.Response(503, headers={"retry-after": "7"}) if number == 1 else httpx.Response(200)
    )
    await run_for(client_of(dispatcher), 9)
    assert dispatcher.times("register") == [0, 7]


async def test_a_dispatcher_that_does_not_know_the_node_gets_a_registration_at_most_once_an_interval(
    autojump_clock: MockClock,
) -> None:
    dispatcher = Dispatcher(lambda what, _number: httpx.Response(404 if what == "heartbeat" else 200))
    await run_for(client_of(dispatcher), 45)
    registered = dispatcher.times("register")
    assert len(registered) == 5
    assert all(later - earlier >= 10 for earlier, later in itertools.pairwise(registered))


async def test_a_row_of_failures_is_logged_once_and_so_is_its_end(
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


async def test_a_dispatcher_that_hangs_gets_one_call_at_a_time_of_five_seconds_each(
    autojump_clock: MockClock,
) -> None:
    dispatcher = Dispatcher(ok, takes_s=1000)
    client = client_of(dispatcher)
    await run_for(client, 30)
    assert len(dispatcher.calls) <= 6
    assert client.problem == "no complete response within 5 s"


async def test_a_response_that_is_too_long_is_a_failure(autojump_clock: MockClock) -> None:
    client = client_of(Dispatcher(lambda _what, _number: httpx.Response(200, content=b" " * 70_000)))
    await run_for(client, 1)
    assert client.problem == "response is longer than 65536 bytes"


async def test_redirects_are_not_followed(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(lambda _what, _number: httpx.Response(307, headers={"location": "http://elsewhere/"}))
    client = client_of(dispatcher)
    await run_for(client, 0.2)
    assert client.problem == "responded with 307"
    assert {call for call, _at in dispatcher.calls} == {"register"}


@pytest.mark.parametrize("error", [RuntimeError, RecursionError, OverflowError, UnicodeError])
async def test_after_an_unforeseen_error_the_dispatcher_is_called_again(
    error: type[Exception], autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    def respond(_what: str, number: int) -> httpx.Response:
        if number == 1:
            raise error("unforeseen")
        return httpx.Response(200)

    dispatcher = Dispatcher(respond)
    client = client_of(dispatcher)
    await run_for(client, 65)
    assert dispatcher.times("register") == [0, 60]
    assert client.registered
    assert "unexpected error while calling the dispatcher; the node goes on" in caplog.messages


async def test_a_wrong_token_is_logged_once_as_an_error(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    await run_for(client_of(Dispatcher(lambda _what, _number: httpx.Response(401)), token="secret"), 300)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "secret" not in caplog.text


async def test_stopping_sends_one_last_heartbeat_within_a_second(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(ok)
    client = client_of(dispatcher)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run, name="client")
        await trio.sleep(5)
        dispatcher.takes_s = 1000
        await client.stop()
        assert trio.current_time() == pytest.approx(6)
    assert dispatcher.times("heartbeat") == [0, 5]


async def test_stopping_sends_nothing_to_a_dispatcher_that_does_not_know_the_node(autojump_clock: MockClock) -> None:
    dispatcher = Dispatcher(lambda _what, _number: httpx.Response(500))
    client = client_of(dispatcher)
    async with trio.open_nursery() as nursery:
        await nursery.start(client.run, name="client")
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
def test_a_node_on_a_loopback_address_is_a_warning_if_the_dispatcher_is_on_another_host(
    base_url: str, dispatcher: str, warned: bool
) -> None:
    assert (loopback_warning(base_url, dispatcher) is not None) == warned
