"""The requests in flight and queued are shown, and an operator ends one of them; in virtual time."""

import dataclasses
import json
from typing import Any

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from fakes.inference_node import REQUEST, InferenceNode
from fakes.upstream import Act, UpstreamServers
from nodeagent.errors import NoSuchRequest, RequestCancelled
from nodeagent.front.exchange import AbortResponse
from nodeagent.front.first_bytes import InferenceRequest
from nodeagent.releases import Releases

EVENTS = (b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n")
SLOW_STREAM = Act(chunks=EVENTS, chunk_s=10.0, event_stream=True)
SECOND = replace(REQUEST, request_id="r2")


@pytest.fixture
async def node(nursery: trio.Nursery) -> InferenceNode:
    node = InferenceNode(UpstreamServers(nursery))
    node.servers.fake.load_s = 1.0
    await nursery.start(node.lane.run)
    return node


class Client:
    """A client that reads its whole answer; what came and how it ended."""

    def __init__(self) -> None:
        self.received: list[bytes] = []
        self.error: Exception | None = None
        self.status: int | None = None
        self.ended_at = 0.0

    async def ask(self, node: InferenceNode, request: InferenceRequest) -> None:
        try:
            with Releases() as stack:
                answer = await node.inference.serve(request, stack)
                self.status = answer.status
                async for chunk in answer.body:
                    self.received.append(chunk)
        except (RequestCancelled, AbortResponse) as error:
            self.error = error
        self.ended_at = trio.current_time()


async def test_they_are_shown_with_their_times(node: InferenceNode, autojump_clock: MockClock) -> None:
    node.servers.acts.extend([SLOW_STREAM, SLOW_STREAM])
    running = node.inference.running
    async with trio.open_nursery() as clients:
        clients.start_soon(Client().ask, node, replace(REQUEST, client_path="/api/chat"))
        await trio.sleep(0.5)
        clients.start_soon(Client().ask, node, SECOND)
        await trio.sleep(4.5)
        first, second = running.shown()
    assert {**first, "since": ""} == {
        "id": 1,
        "request_id": "r1",
        "key_name": None,
        "path": "/api/chat",
        "model_id": "a",
        "device_id": "cpu:0",
        "priority": "normal",
        "state": "in_flight",
        "since": "",
        "queued_s": 1.0,
        "served_s": 4.0,
    }
    assert first["since"].endswith("Z")
    assert (second["id"], second["path"]) == (2, "/v1/chat/completions")
    assert (second["state"], second["queued_s"], second["served_s"]) == ("waiting", 4.5, None)
    assert running.shown() == []


async def cancelled_at(node: InferenceNode, at_s: float, *requests: InferenceRequest) -> list[Client]:
    """The clients of these requests; the last of them is ended after that time."""
    clients = [Client() for _ in requests]
    async with trio.open_nursery() as nursery:
        for client, request in zip(clients, requests, strict=True):
            nursery.start_soon(client.ask, node, request)
            await trio.sleep(0.1)
        await trio.sleep_until(trio.current_time() - 0.1 * len(requests) + at_s)
        assert node.inference.running.cancel(len(requests))["request_id"] == requests[-1].request_id
    node.assert_nothing_is_held()
    assert node.inference.running.shown() == []
    return clients


async def test_one_that_is_queued_ends_at_once_with_a_refusal_and_the_others_go_on(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.acts.extend([SLOW_STREAM, SLOW_STREAM])
    first, second = await cancelled_at(node, 5.0, REQUEST, SECOND)
    assert (first.error, first.received) == (None, list(EVENTS))
    assert isinstance(second.error, RequestCancelled)
    assert second.ended_at == pytest.approx(5.0)
    assert len(node.servers.sent) == 1, "it has never reached a server"


async def test_one_whose_answer_has_not_begun_ends_at_once_too(node: InferenceNode, autojump_clock: MockClock) -> None:
    node.servers.acts.append(dataclasses.replace(SLOW_STREAM, chunk_s=60.0))
    [client] = await cancelled_at(node, 5.0, REQUEST)
    assert isinstance(client.error, RequestCancelled)
    assert client.ended_at == pytest.approx(5.0)
    assert node.inference.tallies.settled.requests == {("a", 503, "request_cancelled"): 1}


@pytest.mark.parametrize("ping_s", [0.0, 3.0])
async def test_a_stream_ends_with_an_event_and_uncleanly(
    ping_s: float, node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.acts.append(SLOW_STREAM)
    [client] = await cancelled_at(node, 15.0, replace(REQUEST, ping_s=ping_s))
    assert isinstance(client.error, AbortResponse)
    assert EVENTS[0] in client.received
    error: dict[str, Any] = json.loads(client.received[-1].removeprefix(b"data: "))["error"]
    assert error["code"] == "request_cancelled"


async def test_a_stream_that_waits_gets_the_event_in_place_of_a_comment(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.fake.load_s = 60.0
    [client] = await cancelled_at(node, 7.0, replace(REQUEST, ping_s=3.0))
    assert (client.status, isinstance(client.error, AbortResponse)) == (200, True)
    assert [chunk[:1] for chunk in client.received] == [b":", b":", b"d"]
    assert client.ended_at == pytest.approx(7.0)


async def test_an_answer_that_is_not_streamed_breaks_off(node: InferenceNode, autojump_clock: MockClock) -> None:
    node.servers.acts.append(Act(chunks=(b"one", b"two"), chunk_s=10.0))
    [client] = await cancelled_at(node, 15.0, REQUEST)
    assert (client.received, isinstance(client.error, AbortResponse)) == ([b"one"], True)


async def test_a_request_that_has_ended_can_not_be_ended(node: InferenceNode, autojump_clock: MockClock) -> None:
    await node.serve(REQUEST)
    for number in (1, 2):
        with pytest.raises(NoSuchRequest):
            node.inference.running.cancel(number)


async def test_it_is_ended_also_where_nothing_waits_for_its_server(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.acts.append(SLOW_STREAM)
    with Releases() as stack:
        answer = await node.inference.serve(replace(REQUEST, ping_s=5.0), stack)
        node.inference.running.cancel(1)  # between two comments
        assert (await answer.body.read()).startswith(b": ")
        assert b"request_cancelled" in await answer.body.read()
        with pytest.raises(AbortResponse):
            await answer.body.read()
    node.assert_nothing_is_held()
