"""The life of a request for inference in virtual time: a real scheduler, over servers that answer by a script."""

import dataclasses
import json
from typing import Any

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from fakes.inference_node import REQUEST
from fakes.inference_node import InferenceNode as Node
from fakes.upstream import EXIT_SHOWS_AFTER_S, OUT_OF_MEMORY, Act, Loss, Sent, UpstreamServers
from nodeagent.errors import BackendCrashed, BackendUnavailable, ModelLoadTimeout, PoisonedRequest
from nodeagent.front.exchange import AbortResponse
from nodeagent.front.first_bytes import InferenceRequest
from nodeagent.front.poison import BLOCKED_S

OTHER = replace(REQUEST, request_id="r2", body=b'{"model": "a", "seed": 1}')
LOAD_S = 1.0

CRASH = Act(loss=Loss.CRASH)
CRASH_IN_STREAM = Act(chunks=(b"data: 1\n\n", b"data: 2\n\n"), event_stream=True, loss=Loss.CRASH, lost_after=1)
STOP = Act(loss=Loss.STOP)


@pytest.fixture
async def node(nursery: trio.Nursery) -> Node:
    node = Node(UpstreamServers(nursery))
    await nursery.start(node.lane.run)
    return node


async def chunks_until_abort(node: Node, request: InferenceRequest = REQUEST) -> list[bytes]:
    """What a client gets before its connection is aborted."""
    chunks: list[bytes] = []
    with pytest.raises(AbortResponse):
        await node.serve(request, chunks)
    node.assert_nothing_is_held()
    return chunks


def error_in(event: bytes) -> dict[str, Any]:
    assert event.startswith(b"data: ")
    assert event.endswith(b"\n\n")
    content: dict[str, Any] = json.loads(event[len(b"data: ") :])
    return content


async def test_a_request_is_sent_as_it_came_and_its_answer_is_relayed(node: Node, autojump_clock: MockClock) -> None:
    node.servers.acts.append(Act(chunks=(b"one", b"two"), chunk_s=0.5, status=201))
    chunks: list[bytes] = []
    answer = await node.serve(chunks=chunks)
    node.assert_nothing_is_held()
    assert chunks == [b"one", b"two"]
    assert node.servers.sent == [Sent(1, "POST", REQUEST.path, REQUEST.headers, REQUEST.body)]
    assert answer.status == 201
    headers = dict(answer.headers)
    assert headers[b"content-type"] == b"application/json"
    assert (headers[b"x-node-device"], headers[b"x-node-queue-ms"], headers[b"x-node-load-ms"]) == (
        b"cpu:0",
        b"0",
        b"1000",
    )
    assert headers[b"server-timing"] == b"queue;dur=0.0, load;dur=1000.0, server;dur=500.0"
    assert b"cache-control" not in headers


async def test_a_stream_is_neither_buffered_nor_cached_on_the_way(node: Node, autojump_clock: MockClock) -> None:
    node.servers.acts.append(Act(event_stream=True))
    answer = await node.serve()
    assert (b"x-accel-buffering", b"no") in answer.headers
    assert (b"cache-control", b"no-cache") in answer.headers


async def test_a_conversation_is_remembered_with_the_device_that_served_it(
    node: Node, autojump_clock: MockClock
) -> None:
    await node.serve(replace(REQUEST, conversation="c"))
    assert node.scheduler.conversations.device_of("c") == "cpu:0"


async def test_a_request_takes_as_many_slots_as_it_needs(node: Node, autojump_clock: MockClock) -> None:
    node.servers.fake.slots = 3
    node.servers.acts.extend([Act(chunk_s=1.0)] * 2)
    async with trio.open_nursery() as clients:
        for request in (REQUEST, OTHER):
            clients.start_soon(node.serve, replace(request, slots=2))
        await trio.sleep(LOAD_S + 0.5)
        assert len(node.servers.sent) == 1, "the second request needs two slots, and one is free"
    assert len(node.servers.sent) == 2


async def test_a_server_lost_before_the_first_byte_costs_one_retry(
    node: Node, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    node.servers.acts.append(CRASH)
    assert await node.body() == b'{"choices": []}'
    assert [sent.generation for sent in node.servers.sent] == [1, 2]
    assert trio.current_time() == pytest.approx(LOAD_S + EXIT_SHOWS_AFTER_S + LOAD_S)
    node.assert_nothing_is_held()
    assert "retrying once" in caplog.text


async def test_a_connection_that_breaks_while_the_server_lives_costs_one_retry_too(
    node: Node, autojump_clock: MockClock
) -> None:
    node.servers.acts.extend([Act(loss=Loss.SERVER_LIVES)] * 2)
    with pytest.raises(BackendCrashed):
        await node.body()
    assert [sent.generation for sent in node.servers.sent] == [1, 1]
    assert trio.current_time() == pytest.approx(LOAD_S + 1.0 + 1.0)
    assert await node.body() == b'{"choices": []}', "no server crashed, so the body is not to blame"


async def test_a_second_loss_is_an_error_that_names_the_device(node: Node, autojump_clock: MockClock) -> None:
    node.servers.acts.extend([CRASH, CRASH])
    with pytest.raises(BackendCrashed) as refused:
        await node.body()
    assert (refused.value.model_id, refused.value.device_id) == ("a", "cpu:0")
    assert len(node.servers.sent) == 2
    node.assert_nothing_is_held()


async def test_a_server_that_ran_out_of_memory_is_blamed_on_no_request_and_the_reason_is_told(
    node: Node, autojump_clock: MockClock
) -> None:
    node.servers.acts.extend([Act(loss=Loss.OUT_OF_MEMORY)] * 4)
    for _ in range(2):
        with pytest.raises(BackendCrashed) as refused:
            await node.body()
        assert refused.value.reason == OUT_OF_MEMORY
        node.assert_nothing_is_held()
    assert await node.body() == b'{"choices": []}', "four servers ended on this body, and it is sent to the fifth"


async def test_a_stream_whose_server_ran_out_of_memory_is_told_so(node: Node, autojump_clock: MockClock) -> None:
    node.servers.acts.extend([dataclasses.replace(CRASH_IN_STREAM, loss=Loss.OUT_OF_MEMORY)] * 2)
    for _ in range(2):
        *_, last = await chunks_until_abort(node)
        assert OUT_OF_MEMORY in error_in(last)["error"]["message"]
    assert await node.body() == b'{"choices": []}'


async def test_a_server_stopped_on_purpose_is_neither_retried_nor_blamed_on_the_request(
    node: Node, autojump_clock: MockClock
) -> None:
    node.servers.acts.extend([STOP, STOP])
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="was stopped"):
            await node.body()
        node.assert_nothing_is_held()
        await trio.sleep(1)
    assert len(node.servers.sent) == 2
    assert await node.body() == b'{"choices": []}'


async def test_a_server_stopped_on_purpose_under_the_retry_is_no_crash_either(
    node: Node, autojump_clock: MockClock
) -> None:
    node.servers.acts.extend([CRASH, STOP])
    with pytest.raises(BackendUnavailable, match="was stopped"):
        await node.body()
    node.assert_nothing_is_held()


async def test_a_body_that_crashed_two_servers_is_rejected_for_a_minute_and_no_other_body_is(
    node: Node, autojump_clock: MockClock
) -> None:
    node.servers.acts.extend([CRASH, CRASH])
    with pytest.raises(BackendCrashed):
        await node.body()
    crashed_at = trio.current_time()
    with pytest.raises(PoisonedRequest) as refused:
        await node.body()
    assert refused.value.blocked_s == pytest.approx(BLOCKED_S)
    assert len(node.servers.sent) == 2
    assert await node.body(OTHER) == b'{"choices": []}'
    await trio.sleep_until(crashed_at + BLOCKED_S - 0.1)
    with pytest.raises(PoisonedRequest):
        await node.body()
    await trio.sleep_until(crashed_at + BLOCKED_S)
    assert await node.body() == b'{"choices": []}'


async def test_a_body_that_was_answered_on_the_retry_is_forgiven(node: Node, autojump_clock: MockClock) -> None:
    for _ in range(3):
        node.servers.acts.append(CRASH)
        assert await node.body() == b'{"choices": []}'


async def test_a_queued_request_is_rejected_once_its_body_has_crashed_two_servers(
    node: Node, autojump_clock: MockClock
) -> None:
    node.servers.acts.extend([CRASH, CRASH])
    refusals: list[type[Exception]] = []

    async def client() -> None:
        with pytest.raises((BackendCrashed, PoisonedRequest)) as refused:
            await node.body()
        refusals.append(refused.type)

    async with trio.open_nursery() as clients:
        for _ in range(3):
            clients.start_soon(client)
    assert refusals == [BackendCrashed, PoisonedRequest, PoisonedRequest]
    assert len(node.servers.sent) == 2
    node.assert_nothing_is_held()


async def test_a_server_that_says_it_is_still_loading_is_a_reason_to_come_back(
    node: Node, autojump_clock: MockClock
) -> None:
    loading = b'{"error": {"message": "Loading model", "type": "unavailable_error", "code": 503}}'
    node.servers.acts.append(Act(status=503, chunks=(loading,)))
    with pytest.raises(ModelLoadTimeout) as refused:
        await node.body()
    assert refused.value.retry_after_s == 1.0
    node.assert_nothing_is_held()


async def test_another_503_of_the_server_is_relayed(node: Node, autojump_clock: MockClock) -> None:
    node.servers.acts.append(Act(status=503, chunks=(b"busy",)))
    assert (await node.serve()).status == 503


async def test_an_event_stream_whose_server_is_lost_gets_an_error_event_before_the_abort(
    node: Node, autojump_clock: MockClock
) -> None:
    node.servers.acts.append(CRASH_IN_STREAM)
    first, event = await chunks_until_abort(node)
    assert first == b"data: 1\n\n"
    content = error_in(event)
    assert content["request_id"] == "r1"
    assert (content["error"]["code"], content["error"]["type"]) == ("backend_crashed", "server_error")
    assert len(node.servers.sent) == 1, "nothing is retried after the first byte"


async def test_an_event_stream_whose_server_is_stopped_on_purpose_says_so(
    node: Node, autojump_clock: MockClock
) -> None:
    stopped = dataclasses.replace(CRASH_IN_STREAM, loss=Loss.STOP)
    node.servers.acts.extend([stopped, stopped])
    for _ in range(2):
        _first, event = await chunks_until_abort(node)
        assert error_in(event)["error"]["code"] == "backend_unavailable"
        await trio.sleep(1)
    assert await node.body() == b'{"choices": []}', "no crash is recorded"


async def test_an_answer_that_is_no_stream_is_aborted_without_another_byte(
    node: Node, autojump_clock: MockClock
) -> None:
    node.servers.acts.append(Act(chunks=(b'{"cho', b'ices": []}'), loss=Loss.CRASH, lost_after=1))
    assert await chunks_until_abort(node) == [b'{"cho']


async def test_crashes_in_mid_stream_count_against_the_body_too(node: Node, autojump_clock: MockClock) -> None:
    node.servers.acts.extend([CRASH_IN_STREAM, CRASH_IN_STREAM])
    for _ in range(2):
        await chunks_until_abort(node)
    with pytest.raises(PoisonedRequest):
        await node.body()


@pytest.mark.parametrize(
    ("stage", "act", "after_s", "sent"),
    [
        ("its model is loading", Act(), LOAD_S / 2, 0),
        ("the first byte has not come", Act(chunk_s=1.0), LOAD_S + 0.5, 1),
        ("the exit of its server is not known yet", CRASH, LOAD_S + EXIT_SHOWS_AFTER_S / 2, 1),
        ("its connection broke and the server lives", Act(loss=Loss.SERVER_LIVES), LOAD_S + 0.5, 1),
        ("it waits for the retry", CRASH, LOAD_S + EXIT_SHOWS_AFTER_S + LOAD_S / 2, 1),
        ("its answer is half there", Act(chunks=(b"1", b"2"), chunk_s=1.0), LOAD_S + 1.5, 1),
        ("its stream has just lost its server", CRASH_IN_STREAM, LOAD_S + EXIT_SHOWS_AFTER_S / 2, 1),
    ],
)
async def test_a_client_that_leaves_holds_nothing_whatever_its_request_was_waiting_for(
    stage: str, act: Act, after_s: float, sent: int, node: Node, autojump_clock: MockClock
) -> None:
    node.servers.acts.append(act)
    with trio.move_on_after(after_s) as client:
        await node.serve()
    assert client.cancelled_caught, f"over before the client left while {stage}"
    node.assert_nothing_is_held()
    assert len(node.servers.sent) == sent
    assert await node.body(OTHER) == b'{"choices": []}'


async def test_a_client_that_leaves_the_queue_holds_nothing_and_delays_no_other_request(
    node: Node, autojump_clock: MockClock
) -> None:
    node.servers.acts.append(Act(chunk_s=5.0))
    async with trio.open_nursery() as clients:
        clients.start_soon(node.serve)
        await trio.sleep(LOAD_S + 0.5)
        with trio.move_on_after(1.0) as client:
            await node.serve(OTHER)
        assert client.cancelled_caught
        assert node.scheduler.admitted == 1
    assert [sent.body for sent in node.servers.sent] == [REQUEST.body]
    node.assert_nothing_is_held()
