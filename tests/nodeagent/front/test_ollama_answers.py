"""llama-server's answers in Ollama's format, and what becomes of those that break."""

import json
from typing import Any, cast

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from trio.testing import MockClock

from fakes.inference_node import REQUEST, InferenceNode
from fakes.upstream import Act, Loss, UpstreamServers
from nodeagent.errors import BackendCrashed, BackendUnavailable, BadAnswer
from nodeagent.front.endpoints import Dialect
from nodeagent.front.exchange import AbortResponse
from nodeagent.front.first_bytes import InferenceRequest
from nodeagent.front.ollama_answers import EmbeddingsTranslator, LoadTranslator, TextTranslator
from nodeagent.front.translation import Translator, Untranslatable
from nodeagent.releases import Releases

USAGE = {"prompt_tokens": 5, "completion_tokens": 3}
TIMINGS = {"prompt_ms": 1.5, "predicted_ms": 20.0}
FIGURES = {
    "total_duration": 4_000_000_000,
    "load_duration": 2_000_000_000,
    "prompt_eval_count": 5,
    "prompt_eval_duration": 1_500_000,
    "eval_count": 3,
    "eval_duration": 20_000_000,
}


def text(*, streams: bool = True, is_chat: bool = True, thinks: bool = True) -> TextTranslator:
    return TextTranslator("m", 10.0, streams=streams, is_chat=is_chat, thinks=thinks)


def event(content: Any) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def delta(finish: str | None = None, **said: Any) -> bytes:
    return event({"choices": [{"index": 0, "delta": said, "finish_reason": finish}]})


END = delta("stop") + event({"choices": [], "usage": USAGE, "timings": TIMINGS}) + b"data: [DONE]\n\n"


def lines(content: bytes) -> list[dict[str, Any]]:
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.splitlines()]


def undated(line: dict[str, Any]) -> dict[str, Any]:
    assert line["created_at"].endswith("Z")
    return {name: value for name, value in line.items() if name != "created_at"}


def test_a_stream_is_lines_and_the_last_has_the_figures() -> None:
    translator = text()
    first, second = lines(
        translator.feed(delta(role="assistant", content=None) + delta(content="a") + delta(content="b"))
    )
    assert undated(first) == {"model": "m", "message": {"role": "assistant", "content": "a"}, "done": False}
    assert second["message"]["content"] == "b"
    assert translator.feed(END) == b""
    [last] = lines(translator.end(2.0, 14.0))
    said = {"model": "m", "message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop"}
    assert undated(last) == said | FIGURES


def test_generate_has_its_text_in_response() -> None:
    translator = text(is_chat=False)
    [line] = lines(translator.feed(event({"choices": [{"text": "a", "finish_reason": "length"}], "usage": USAGE})))
    assert undated(line) == {"model": "m", "response": "a", "done": False}
    [last] = lines(translator.end(0.0, 14.0))
    assert (last["response"], last["done_reason"], last["eval_count"]) == ("", "length", 3)


def test_an_answer_that_is_not_streamed_is_one_object() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": "a", "reasoning_content": "t", "tool_calls": [call]}
    whole = {"choices": [{"message": message, "finish_reason": "tool_calls"}], "usage": USAGE, "timings": TIMINGS}
    content = json.dumps(whole).encode()
    translator = text(streams=False)
    assert translator.feed(content[:10]) == translator.feed(content[10:]) == b""
    [line] = lines(translator.end(2.0, 14.0))
    calls = [{"id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}]
    said = {"role": "assistant", "content": "a", "thinking": "t", "tool_calls": calls}
    assert undated(line) == {"model": "m", "message": said, "done": True, "done_reason": "stop"} | FIGURES


def test_what_the_model_thinks_is_apart_from_its_text_and_left_out_if_it_was_not_to_think() -> None:
    [thinking, answer] = lines(text().feed(delta(reasoning_content="hm") + delta(content="a")))
    assert thinking["message"] == {"role": "assistant", "content": "", "thinking": "hm"}
    assert answer["message"] == {"role": "assistant", "content": "a"}
    assert text(thinks=False).feed(delta(reasoning_content="hm")) == b""
    [generated] = lines(text(is_chat=False).feed(delta(reasoning_content="hm")))
    assert (generated["response"], generated["thinking"]) == ("", "hm")


def test_calls_of_tools_are_put_together_and_one_that_was_cut_off_is_left_out() -> None:
    translator = text()
    pieces: list[list[dict[str, Any]]] = [
        [{"index": 0, "id": "c1", "function": {"name": "add", "arguments": '{"a"'}}],
        [{"index": 0, "function": {"arguments": ": 1}"}}],
        [{"index": 1, "function": {"name": "none"}}],
        [{"index": 2, "function": {"name": "cut", "arguments": '{"a": '}}],
        [{"index": 3, "function": {"name": "list", "arguments": "[]"}}],
    ]
    for piece in pieces:
        assert translator.feed(delta(tool_calls=piece)) == b""
    translator.feed(END)
    calls, last = lines(translator.end(0.0, 14.0))
    assert (calls["done"], calls["message"]["tool_calls"]) == (
        False,
        [
            {"id": "c1", "function": {"name": "add", "arguments": {"a": 1}}},
            {"function": {"name": "none", "arguments": {}}},
        ],
    )
    assert (last["done"], "tool_calls" in last["message"]) == (True, False)


def test_calls_of_tools_are_bounded() -> None:
    translator = text()
    piece = delta(tool_calls=[{"index": 0, "function": {"arguments": "x" * 2**20}}])
    for _ in range(3):
        translator.feed(piece)
    with pytest.raises(Untranslatable, match="longer than 4194304 bytes"):
        translator.feed(piece)


def test_an_answer_that_is_collected_is_bounded() -> None:
    translator = text(streams=False)
    for _ in range(4):
        translator.feed(b" " * 2**24)
    with pytest.raises(Untranslatable, match="ask for less at once"):
        translator.feed(b" ")


def test_a_comment_of_the_server_keeps_the_line_open() -> None:
    [line] = lines(text().feed(b": ping\n\n"))
    assert (line["message"]["content"], line["done"]) == ("", False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (event({"error": {"message": "too long", "code": 400}}), "too long"),
        (b'error: {"message": "too long"}\n\n', "too long"),
        (event({"error": "bad"}), "bad"),
        (event({"choices": 3}), "is not what was asked for: Expected `array`"),
        (b"data: {\n\n", "is not what was asked for"),
    ],
)
def test_an_error_in_the_stream_is_the_clients(content: bytes, message: str) -> None:
    with pytest.raises(Untranslatable) as found:
        text().feed(content)
    assert message in str(found.value)


def test_a_stream_without_a_reason_for_its_end_is_not_taken_for_complete() -> None:
    translator = text()
    translator.feed(delta(content="a") + b"data: [DONE]\n\n")
    with pytest.raises(Untranslatable, match="without saying why"):
        translator.end(0.0, 14.0)


def vectors(*embeddings: list[float]) -> bytes:
    data = [{"index": index, "embedding": it} for index, it in enumerate(embeddings)]
    return json.dumps({"data": data[::-1], "usage": USAGE}).encode()


def test_embeddings_are_a_list_in_the_order_of_their_texts() -> None:
    translator = EmbeddingsTranslator("m", 10.0, is_old=False, dimensions=None)
    assert translator.feed(vectors([0.6, 0.8], [1.0, 0.0])) == translator.waiting() == b""
    assert json.loads(translator.end(2.0, 14.0)) == {
        "model": "m",
        "embeddings": [[0.6, 0.8], [1.0, 0.0]],
        "total_duration": 4_000_000_000,
        "load_duration": 2_000_000_000,
        "prompt_eval_count": 5,
    }


def test_embeddings_that_are_cut_have_the_length_one() -> None:
    translator = EmbeddingsTranslator("m", 10.0, is_old=False, dimensions=2)
    translator.feed(vectors([0.3, 0.4, 0.9], [0.0, 0.0, 1.0]))
    first, second = json.loads(translator.end(0.0, 10.0))["embeddings"]
    assert first == pytest.approx([0.6, 0.8])
    assert second == [0.0, 0.0]


def test_the_older_path_has_one_embedding() -> None:
    translator = EmbeddingsTranslator("m", 10.0, is_old=True, dimensions=None)
    translator.feed(vectors([0.6, 0.8]))
    assert json.loads(translator.end(0.0, 10.0)) == {"embedding": [0.6, 0.8]}
    several = EmbeddingsTranslator("m", 10.0, is_old=True, dimensions=None)
    several.feed(vectors([0.6], [0.8]))
    with pytest.raises(Untranslatable, match="2 embeddings instead of one"):
        several.end(0.0, 10.0)


@given(
    st.lists(st.binary() | st.sampled_from([delta(content="a"), END, b"data: ", b"[]", b"{}", b"null"])), st.booleans()
)
def test_whatever_a_server_sends_is_translated_or_said_to_be_untranslatable(pieces: list[bytes], streams: bool) -> None:
    translator = text(streams=streams)
    try:
        made = b"".join(map(translator.feed, pieces)) + translator.end(0.0, 14.0)
    except Untranslatable:
        return
    assert lines(made)[-1]["done"]


# On the road of every request.


def ollama(translator: Translator, **fields: Any) -> InferenceRequest:
    return replace(REQUEST, dialect=Dialect.OLLAMA, translator=translator, **fields)


async def node_with(nursery: trio.Nursery, *acts: Act) -> InferenceNode:
    node = InferenceNode(UpstreamServers(nursery, *acts))
    await nursery.start(node.lane.run)
    return node


async def test_a_stream_is_translated_as_it_comes(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    chunks = (delta(role="assistant", content=None), delta(content="a"), delta(content="b"), END)
    node = await node_with(nursery, Act(chunks=chunks, chunk_s=1.0, event_stream=True))
    received: list[bytes] = []
    answer = await node.serve(ollama(text()), received)
    assert (b"content-type", b"application/x-ndjson") in answer.headers
    assert [lines(it)[0]["message"]["content"] for it in received] == ["a", "b", ""]
    assert lines(received[-1])[0]["done"]
    node.assert_nothing_is_held()


async def test_a_stream_that_waits_says_nothing_in_lines(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    node = await node_with(nursery, Act(chunks=(delta(content="a"), END), chunk_s=25.0, event_stream=True))
    received: list[bytes] = []
    answer = await node.serve(ollama(text(), ping_s=10.0), received)
    assert answer.headers[0] == (b"content-type", b"application/x-ndjson")
    assert [lines(it)[0]["message"]["content"] for it in received] == ["", "", "a", ""]
    node.assert_nothing_is_held()


@pytest.mark.parametrize("ping_s", [0.0, 10.0])
async def test_a_stream_whose_server_is_lost_ends_with_a_line_that_says_so_and_uncleanly(
    ping_s: float, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    act = Act(chunks=(delta(content="a"), END), chunk_s=15.0, event_stream=True, loss=Loss.CRASH, lost_after=1)
    node = await node_with(nursery, act)
    received: list[bytes] = []
    with pytest.raises(AbortResponse):
        await node.serve(ollama(text(), ping_s=ping_s), received)
    assert list(lines(received[-1])[0]) == ["error"]
    assert "crashed during this request" in lines(received[-1])[0]["error"]
    node.assert_nothing_is_held()


async def test_an_error_in_mid_stream_ends_it_in_the_same_way(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    broken = event({"error": {"message": "out of context"}})
    node = await node_with(nursery, Act(chunks=(delta(content="a"), broken), event_stream=True))
    received: list[bytes] = []
    with pytest.raises(AbortResponse):
        await node.serve(ollama(text()), received)
    assert lines(received[-1]) == [{"error": "out of context"}]
    assert node.inference.tallies.settled.requests == {("a", 502, "bad_answer"): 1}
    node.assert_nothing_is_held()


async def test_a_stream_without_its_end_is_an_error(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    node = await node_with(nursery, Act(chunks=(delta(content="a"),), event_stream=True))
    received: list[bytes] = []
    with pytest.raises(AbortResponse):
        await node.serve(ollama(text()), received)
    assert lines(received[-1]) == [{"error": "The server's answer ended without saying why."}]


@pytest.mark.parametrize("streams", [True, False])
async def test_a_servers_error_keeps_its_status_and_gets_ollamas_shape(
    streams: bool, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    content = json.dumps({"error": {"message": "too long", "code": 400}}).encode()
    node = await node_with(nursery, Act(status=400, chunks=(content,)))
    received: list[bytes] = []
    answer = await node.serve(ollama(text(streams=streams)), received)
    assert (answer.status, json.loads(b"".join(received))) == (400, {"error": "too long"})
    assert (b"content-type", b"application/json") in answer.headers


async def test_an_answer_that_is_not_streamed_is_an_error_of_its_own_if_it_breaks(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    for loss, kind in ((Loss.CRASH, BackendCrashed), (Loss.STOP, BackendUnavailable)):
        node = await node_with(nursery, Act(chunks=(b"{", b"}"), loss=loss, lost_after=1))
        with pytest.raises(kind):
            await node.serve(ollama(text(streams=False)))
        node.assert_nothing_is_held()
    node = await node_with(nursery, Act(chunks=(b"[]",)))
    with pytest.raises(BadAnswer, match="is not what was asked for"):
        await node.serve(ollama(text(streams=False)))


async def test_a_model_is_loaded_for_a_request_that_asks_for_nothing_else(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    node = await node_with(nursery, Act(chunks=(b'{"tokens": []}',)))
    node.servers.fake.load_s = 3.0
    body = await node.body(ollama(LoadTranslator("m", is_chat=True), slots=0))
    assert (lines(body)[0]["done_reason"], trio.current_time() >= 3.0) == ("load", True)


async def test_an_answer_that_is_there_needs_no_server(nursery: trio.Nursery, autojump_clock: MockClock) -> None:
    node = await node_with(nursery)
    with Releases() as stack:
        request = ollama(cast(Translator, None), answer=b"{}\n")
        answer = await node.inference.serve(request, stack)
        assert await answer.body.read() == b"{}\n"
    assert node.servers.sent == []
