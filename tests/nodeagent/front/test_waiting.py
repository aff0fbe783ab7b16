"""Streams that wait for their first byte keep their line open, in virtual time over servers that answer by a script."""

import dataclasses
import json
from typing import Any

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from fakes.inference_node import REQUEST, InferenceNode
from fakes.upstream import EXIT_SHOWS_AFTER_S, Act, Loss, UpstreamServers
from nodeagent.front.answer import Answer
from nodeagent.front.exchange import AbortResponse
from nodeagent.front.first_bytes import InferenceRequest
from nodeagent.releases import Releases

PING_S = 15.0
STREAM = replace(REQUEST, ping_s=PING_S)
OTHER = replace(STREAM, request_id="r2", model_id="b", body=b'{"model": "b"}')
EVENTS = (b"data: 1\n\n", b"data: [DONE]\n\n")
ANSWER = Act(chunks=EVENTS, event_stream=True)

# What a client receives, each with the time at which it came.
Received = list[tuple[float, bytes]]


@pytest.fixture
async def node(nursery: trio.Nursery) -> InferenceNode:
    node = InferenceNode(UpstreamServers(nursery))
    await nursery.start(node.lane.run)
    return node


async def receive(
    node: InferenceNode, request: InferenceRequest = STREAM, received: Received | None = None
) -> tuple[Answer, Received]:
    """Be a client that reads its whole answer."""
    received = [] if received is None else received
    with Releases() as stack:
        answer = await node.inference.serve(request, stack)
        async for chunk in answer.body:
            received.append((round(trio.current_time(), 3), chunk))
    return answer, received


async def receive_until_abort(node: InferenceNode, request: InferenceRequest = STREAM) -> Received:
    received: Received = []
    with pytest.raises(AbortResponse):
        await receive(node, request, received)
    node.assert_nothing_is_held()
    return received


def error_in(event: bytes) -> dict[str, Any]:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    content: dict[str, Any] = json.loads(event[len(b"data: ") :])
    assert content["request_id"] == STREAM.request_id
    error: dict[str, Any] = content["error"]
    return error


async def test_a_stream_whose_model_loads_says_so_until_it_begins(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.fake.load_s = 25.0
    node.servers.acts.append(ANSWER)
    answer, received = await receive(node, replace(STREAM, ping_s=10.0))
    assert answer.status == 200
    assert dict(answer.headers) == {
        b"content-type": b"text/event-stream",
        b"x-accel-buffering": b"no",
        b"cache-control": b"no-cache",
    }
    loading = b": loading a\n\n"
    assert received == [(10.0, loading), (20.0, loading), (25.0, EVENTS[0]), (25.0, EVENTS[1])]
    assert len(node.servers.sent) == 1
    node.assert_nothing_is_held()


async def test_a_stream_that_begins_in_time_has_no_comment_and_says_where_it_was_served(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.fake.load_s = 14.0
    node.servers.acts.append(ANSWER)
    answer, received = await receive(node)
    assert dict(answer.headers)[b"x-node-device"] == b"cpu:0"
    assert received == [(14.0, EVENTS[0]), (14.0, EVENTS[1])]


@pytest.mark.parametrize("request_", [REQUEST, replace(STREAM, ping_s=0.0)], ids=["no stream", "turned off"])
async def test_nothing_is_said_before_an_answer_that_is_no_stream_nor_if_that_is_turned_off(
    request_: InferenceRequest, node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.fake.load_s = 29.0
    node.servers.acts.append(ANSWER)
    answer, received = await receive(node, request_)
    assert dict(answer.headers)[b"x-node-load-ms"] == b"29000"
    assert [chunk for _at, chunk in received] == list(EVENTS)


async def test_a_stream_in_the_queue_says_its_place_and_what_loads(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.fake.load_s = 20.0
    node.servers.acts.extend([dataclasses.replace(ANSWER, chunk_s=12.0), ANSWER, ANSWER])
    received: dict[str, Received] = {}
    async with trio.open_nursery() as clients:
        for request in (STREAM, replace(STREAM, request_id="r3"), OTHER):
            clients.start_soon(receive, node, request, received.setdefault(request.request_id, []))
            await trio.sleep(0.1)  # they are admitted in this order
    # The first one runs from 20 to 56: its two events and the end take 12 s each.
    assert [chunk for _at, chunk in received["r1"]] == [b": loading a\n\n", b": processing the prompt\n\n", *EVENTS]
    assert received["r3"] == [
        (15.1, b": waiting: place 2 in the queue, loading a\n\n"),
        (30.1, b": waiting: place 1 in the queue\n\n"),
        (45.1, b": waiting: place 1 in the queue\n\n"),
        (56.0, EVENTS[0]),
        (56.0, EVENTS[1]),
    ]
    assert received["r2"][:4] == [
        (15.2, b": waiting: place 3 in the queue, loading a\n\n"),
        (30.2, b": waiting: place 2 in the queue\n\n"),
        (45.2, b": waiting: place 2 in the queue\n\n"),
        (60.2, b": loading b\n\n"),
    ]
    node.assert_nothing_is_held()


async def test_the_order_of_a_long_queue_is_worked_out_once_a_second_at_most(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    ordered: list[float] = []
    expected_starts = node.lane.expected_starts

    def counted() -> Any:
        ordered.append(trio.current_time())
        return expected_starts()

    node.lane.expected_starts = counted  # type: ignore[method-assign]
    node.servers.fake.load_s = 29.0
    received: list[Received] = [[] for _ in range(4)]
    async with trio.open_nursery() as clients:
        for number, chunks in enumerate(received):
            clients.start_soon(receive, node, replace(STREAM, request_id=f"r{number}", ping_s=10.0), chunks)
            await trio.sleep(0.4)
        await trio.sleep(18.0)
        clients.cancel_scope.cancel()
    assert ordered == pytest.approx([10.0, 11.2])
    assert [chunks[0][1] for chunks in received] == [
        b": loading a\n\n",
        *(b": waiting: place %d in the queue, loading a\n\n" % place for place in (2, 3, 4)),
    ]


async def test_a_server_that_takes_long_over_the_prompt_is_asked_once_and_the_line_kept_open(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.acts.append(dataclasses.replace(ANSWER, chunk_s=40.0))
    _answer, received = await receive(node)
    processing = b": processing the prompt\n\n"
    # After the first byte the server speaks for itself.
    assert received == [(15.0, processing), (30.0, processing), (41.0, EVENTS[0]), (81.0, EVENTS[1])]
    assert len(node.servers.sent) == 1


async def test_a_server_lost_after_comments_but_before_its_first_byte_still_costs_one_retry(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.fake.load_s = 10.0
    node.servers.acts.extend([dataclasses.replace(ANSWER, chunk_s=8.0, loss=Loss.CRASH), ANSWER])
    _answer, received = await receive(node)
    begins = round(10.0 + 8.0 + EXIT_SHOWS_AFTER_S + 10.0, 3)
    assert received == [(15.0, b": processing the prompt\n\n"), (begins, EVENTS[0]), (begins, EVENTS[1])]
    assert [sent.generation for sent in node.servers.sent] == [1, 2]
    node.assert_nothing_is_held()


async def test_a_comment_while_the_exit_of_a_lost_server_is_awaited_delays_no_retry(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.acts.extend([Act(loss=Loss.SERVER_LIVES), ANSWER])
    _answer, received = await receive(node, replace(STREAM, ping_s=0.3))
    assert received[-2:] == [(2.0, EVENTS[0]), (2.0, EVENTS[1])], "a load of 1 s, and 1 s in which the exit may show"


async def test_a_second_loss_after_comments_is_an_error_event_and_an_unclean_end(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.fake.load_s = 20.0
    node.servers.acts.extend([Act(loss=Loss.CRASH)] * 2)
    received = await receive_until_abort(node)
    error = error_in(received[-1][1])
    assert (error["code"], error["type"]) == ("backend_crashed", "server_error")
    assert len(node.servers.sent) == 2


async def test_a_refusal_after_comments_is_an_error_event_and_an_unclean_end(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.fake.load_s = 20.0
    node.servers.fake.broken.add("a")
    (_at, comment), (at, event) = await receive_until_abort(node)
    assert comment == b": loading a\n\n"
    assert at == 20.0
    assert error_in(event)["code"] == "backend_unavailable"


async def test_a_refusal_before_the_first_comment_has_its_own_status(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.fake.broken.add("a")
    with pytest.raises(Exception, match="exited with code 1"):
        await receive(node)
    node.assert_nothing_is_held()


@pytest.mark.parametrize(
    ("act", "message", "kind"),
    [
        (
            Act(status=400, chunks=(b'{"error": {"code": 400, "message": "bad', b' grammar", "type": "invalid"}}')),
            "bad grammar",
            "invalid",
        ),
        (
            Act(status=500, chunks=(b"oh \xff",)),
            "The server answered with status 500 instead of a stream: oh \N{REPLACEMENT CHARACTER}",
            "server_error",
        ),
        (Act(chunks=(b"[]",)), "The server answered with status 200 instead of a stream: []", "server_error"),
        (
            Act(status=400, chunks=(b"cut", b"off"), loss=Loss.CRASH, lost_after=1),
            "The server answered with status 400 instead of a stream: cut",
            "invalid_request_error",
        ),
    ],
)
async def test_an_answer_that_is_no_stream_becomes_an_error_event_after_comments(
    act: Act, message: str, kind: str, node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.fake.load_s = 20.0
    # A comment comes in the middle of it too.
    node.servers.acts.append(dataclasses.replace(act, chunk_s=6.0))
    received = await receive_until_abort(node)
    assert [chunk for _at, chunk in received[:-1]] == [b": loading a\n\n"] + [b": processing the prompt\n\n"] * (
        len(received) - 2
    )
    error = error_in(received[-1][1])
    assert (error["message"], error["type"]) == (message, kind)
    assert len(node.servers.sent) == 1


async def test_a_bug_after_comments_is_an_error_event_and_is_raised_then(
    node: InferenceNode, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_sent: object) -> Act:
        raise RuntimeError("a fault of ours")

    node.servers.fake.load_s = 20.0
    monkeypatch.setattr(node.servers, "_play", fail)
    received: Received = []
    with pytest.raises(RuntimeError, match="a fault of ours"):
        await receive(node, STREAM, received)
    assert error_in(received[-1][1])["code"] == "internal_error"
    node.assert_nothing_is_held()


@pytest.mark.parametrize(
    ("stage", "load_s", "act", "after_s", "sent"),
    [
        ("its model is loading", 60.0, ANSWER, 20.0, 0),
        ("its server processes the prompt", 1.0, dataclasses.replace(ANSWER, chunk_s=60.0), 20.0, 1),
        ("it waits for the retry", 17.0, dataclasses.replace(ANSWER, loss=Loss.CRASH), 20.0, 1),
        ("its answer is half there", 17.0, dataclasses.replace(ANSWER, chunk_s=10.0), 30.0, 1),
    ],
)
async def test_a_client_that_leaves_after_comments_holds_nothing(
    stage: str, load_s: float, act: Act, after_s: float, sent: int, node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.fake.load_s = load_s
    node.servers.acts.append(act)
    received: Received = []
    with trio.move_on_after(after_s) as client:
        await receive(node, STREAM, received)
    assert client.cancelled_caught, f"over before the client left while {stage}"
    assert received[0][0] == PING_S
    node.assert_nothing_is_held()
    assert len(node.servers.sent) == sent
    assert not node.lane.queue()
