"""The bodies that are kept of requests and answers: how they are shown, and that they never take more than they may."""

import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from trio.testing import MockClock

from fakes.inference_node import REQUEST, InferenceNode
from fakes.upstream import Act, Loss, UpstreamServers
from nodeagent.errors import BackendCrashed, QueueFull
from nodeagent.front.bodies import Bodies, KeptBodies, KeptBody, Limits, shown
from nodeagent.front.exchange import AbortResponse
from nodeagent.front.first_bytes import InferenceRequest
from nodeagent.front.ollama_answers import TextTranslator
from nodeagent.releases import Releases

MIB = 2**20
TEXT = "text/plain; charset=utf-8"


def bodies_of(each: int = 100, together: int = 1000) -> Bodies:
    bodies = Bodies()
    bodies.limit(Limits(each, together))
    return bodies


def body_of(*chunks: bytes, content_type: str = TEXT, each: int = 100) -> dict[str, Any]:
    body = KeptBody(bodies_of(each), content_type)
    for chunk in chunks:
        body.add(chunk)
    body.end()
    return body.shown()


@pytest.mark.parametrize(
    ("chunks", "size", "cut", "text"),
    [
        ((), 0, False, ""),
        ((b"one ", b"", b"two"), 7, False, "one two"),
        ((b"12345678",), 8, False, "12345678"),
        ((b"12345678", b"9"), 9, True, "12345678"),
        ((b"123456789", b"more"), 13, True, "12345678"),
        (("123456789".replace("8", "ä").encode(), b"x"), 11, True, "1234567"),
        ((b"a\xffb",), 3, False, "a\ufffdb"),
        ((b"a\xc3",), 2, False, "a\ufffd"),
        ((b"a\x00\x1b[31m",), 7, False, "a\x00\x1b[31m"),
    ],
)
def test_a_text_is_shown_up_to_its_bound_and_says_if_it_is_cut(
    chunks: tuple[bytes, ...], size: int, cut: bool, text: str
) -> None:
    assert body_of(*chunks, each=8) == {"type": "text/plain", "bytes": size, "cut": cut, "text": text}


@pytest.mark.parametrize(
    ("content_type", "shown_as", "is_text"),
    [
        ("application/json", "application/json", True),
        ("Application/JSON; charset=utf-8", "application/json", True),
        ("application/problem+json", "application/problem+json", True),
        ("application/x-ndjson", "application/x-ndjson", True),
        ("text/event-stream", "text/event-stream", True),
        ("multipart/form-data; boundary=secret", "multipart/form-data", False),
        ("audio/wav", "audio/wav", False),
        ("", "", False),
        ("text/\x1b[31m", "", False),
        ("x" * 200, "x" * 100, False),
    ],
)
def test_what_is_no_text_is_its_type_and_size(content_type: str, shown_as: str, is_text: bool) -> None:
    body = body_of(b"content", b"more", content_type=content_type)
    assert body == {"type": shown_as, "bytes": 11, "cut": False, "text": "contentmore" if is_text else None}


def kept_in(bodies: Bodies, number: int, content: bytes, oldest: int = 0) -> None:
    kept = KeptBodies(bodies)
    kept.requested([(b"content-type", b"text/plain")], content)
    bodies.keep(number, kept, oldest)


def test_the_oldest_make_room_and_go_with_their_records() -> None:
    bodies = bodies_of(each=40, together=100)
    for number in range(1, 5):
        kept_in(bodies, number, bytes(50))
    assert ([number in bodies for number in range(1, 5)], bodies.held_bytes) == ([False, False, True, True], 80)
    kept_in(bodies, 5, b"1", oldest=4)
    assert ([number in bodies for number in range(3, 6)], bodies.held_bytes) == ([False, True, True], 41)


def test_turned_off_they_are_forgotten_also_those_in_progress_and_less_room_forgets_some() -> None:
    bodies = bodies_of(each=40, together=100)
    kept_in(bodies, 1, bytes(40))
    kept_in(bodies, 2, bytes(30))
    bodies.limit(Limits(40, 50))
    assert (1 in bodies, 2 in bodies, bodies.held_bytes) == (False, True, 30)
    begun = KeptBodies(bodies)
    answer = begun.answered("text/plain")
    answer.add(bytes(10))
    bodies.limit(None)
    answer.add(bytes(10))
    bodies.keep(3, begun, 0)
    assert (2 in bodies, 3 in bodies, bodies.held_bytes) == (False, False, 0)
    assert shown(bodies.find(2)) == {"request_body": None, "answer_body": None}


CHUNKS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 60)), max_size=60)


@given(each=st.integers(1, 50), together=st.integers(1, 120), chunks=CHUNKS, later=st.integers(1, 120))
def test_all_together_hold_no_more_than_they_may_at_any_time(
    each: int, together: int, chunks: list[tuple[int, int]], later: int
) -> None:
    bodies = bodies_of(each, together)
    in_progress: dict[int, tuple[KeptBodies, KeptBody]] = {}
    ended: list[KeptBodies] = []

    def held() -> list[int]:
        alive = [kept for kept, _answer in in_progress.values()]
        alive += [kept for number, kept in enumerate(ended) if number in bodies]
        return [len(body.content) for kept in alive for body in (kept.request, kept.answer) if body is not None]

    for client, size in chunks:
        if size == 0 and client in in_progress:
            kept, _answer = in_progress.pop(client)
            ended.append(kept)
            bodies.keep(len(ended) - 1, kept, oldest=len(ended) - 10)
        elif client not in in_progress:
            kept = KeptBodies(bodies)
            kept.requested([(b"content-type", b"text/plain")], bytes(size))
            in_progress[client] = kept, kept.answered("text/plain")
        else:
            in_progress[client][1].add(bytes(size))
        assert sum(held()) == bodies.held_bytes <= together
        assert all(length <= each for length in held())
    bodies.limit(Limits(each, later))
    for kept, _answer in in_progress.values():
        bodies.keep(len(ended), kept, 0)
        ended.append(kept)
    bodies.limit(Limits(each, later))
    assert bodies.held_bytes <= later
    bodies.limit(None)
    assert bodies.held_bytes == 0


@pytest.fixture
async def node(nursery: trio.Nursery) -> AsyncIterator[InferenceNode]:
    node = InferenceNode(UpstreamServers(nursery))
    node.inference.tallies.activity.bodies.limit(Limits(64 * 1024, 16 * MIB))
    await nursery.start(node.lane.run)
    yield node
    node.assert_nothing_is_held()


def last(node: InferenceNode) -> tuple[str, str]:
    """The texts of the last request and its answer."""
    activity = node.inference.tallies.activity
    both = shown(activity.bodies.find(activity.last_id))
    return both["request_body"]["text"], both["answer_body"]["text"]


async def test_a_request_and_its_answer_are_kept_as_they_were_sent(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.acts.append(Act(chunks=(b"one", b"two"), chunk_s=0.5))
    assert await node.body() == b"onetwo"
    assert last(node) == (REQUEST.body.decode(), "onetwo")


async def test_a_stream_is_kept_with_its_comments_and_the_event_that_ends_it(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    node.servers.acts.append(
        Act(chunks=(b"data: 1\n\n", b"-"), chunk_s=8.0, event_stream=True, loss=Loss.CRASH, lost_after=1)
    )
    chunks: list[bytes] = []
    with pytest.raises(AbortResponse):
        await node.serve(replace(REQUEST, ping_s=5.0), chunks)
    assert chunks[0].startswith(b": ")
    assert b"backend_crashed" in chunks[-1]
    assert last(node)[1] == b"".join(chunks).decode()


async def test_an_answer_is_kept_as_far_as_its_client_got_it(node: InferenceNode, autojump_clock: MockClock) -> None:
    node.servers.acts.append(Act(chunks=(b"data: 1\n\n", b"data: 2\n\n"), event_stream=True))
    with Releases() as held:
        answer = await node.inference.serve(REQUEST, held)
        await answer.body.read()
    assert last(node)[1] == "data: 1\n\n"


async def test_a_translated_answer_is_kept_as_its_client_got_it(node: InferenceNode, autojump_clock: MockClock) -> None:
    event = b'data: {"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": "stop"}]}\n\n'
    node.servers.acts.append(Act(chunks=(event, b"data: [DONE]\n\n"), event_stream=True))
    translator = TextTranslator("m", 0.0, streams=True, is_chat=True, thinks=False)
    chunks: list[bytes] = []
    await node.serve(replace(REQUEST, translator=translator, streamed=True), chunks)
    assert last(node)[1] == b"".join(chunks).decode()
    assert '"content":"hi"' in last(node)[1].replace(": ", ":")


async def test_a_refusal_is_the_answer(node: InferenceNode, autojump_clock: MockClock) -> None:
    node.servers.acts.extend([Act(loss=Loss.CRASH)] * 2)
    with pytest.raises(BackendCrashed):
        await node.body()
    assert '"code":"backend_crashed"' in last(node)[1].replace(": ", ":")
    async with trio.open_nursery() as clients:
        for number in range(4):
            clients.start_soon(node.serve, replace(REQUEST, request_id=f"r{number}", body=b"{}"))
        await trio.sleep(0.1)
        with pytest.raises(QueueFull):
            await node.body(replace(REQUEST, body=b'{"five": 5}'))
        assert last(node)[0] == '{"five": 5}'
        assert '"code":"queue_full"' in last(node)[1].replace(": ", ":")


async def test_without_the_setting_nothing_is_kept(node: InferenceNode, autojump_clock: MockClock) -> None:
    activity = node.inference.tallies.activity
    activity.bodies.limit(None)
    answer = await node.serve()
    assert type(answer.body).__name__ == "AnswerBody"
    assert (activity.last_id, 1 in activity.bodies, activity.bodies.held_bytes) == (1, False, 0)


async def test_many_large_bodies_take_no_more_memory_than_is_set(
    node: InferenceNode, autojump_clock: MockClock
) -> None:
    activity = node.inference.tallies.activity
    activity.bodies.limit(Limits(MIB, 4 * MIB))
    chunk = bytes(MIB // 4)

    def one(number: int) -> InferenceRequest:
        return replace(REQUEST, request_id=f"r{number}", body=b'{"a": "' + b"x" * (3 * MIB // 2) + b'"}')

    tracemalloc.start()
    try:
        for number in range(20):
            node.servers.acts.append(Act(chunks=(chunk,) * 6, event_stream=True))
            await node.serve(one(number))
            node.servers.sent.clear()  # the fake's, which has the bodies too
        held_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert activity.bodies.held_bytes == 4 * MIB
    assert held_bytes < 6 * MIB
    assert [number in activity.bodies for number in (18, 19, 20)] == [False, True, True]
