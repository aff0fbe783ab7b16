"""Errors in the shape of the API that the path belongs to."""

import json
from typing import Any

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from fakes.inference_node import REQUEST, InferenceNode
from fakes.upstream import Act, Loss, UpstreamServers
from nodeagent.errors import ModelNotFound, QueueFull, QueueTimeout, Refusal, ServerBusy
from nodeagent.front.endpoints import ENDPOINTS, Dialect
from nodeagent.front.error_shapes import dialect_of
from nodeagent.front.refusals import error_event, error_response, internal_error_response, refusal_response

MESSAGES = replace(REQUEST, path="/v1/messages", dialect=Dialect.ANTHROPIC)
TOO_LONG: dict[str, Any] = {"code": 400, "message": "too long", "type": "exceed_context_size_error", "n_ctx": 64}


def error(content: bytes) -> Any:
    return json.loads(content)


def test_the_dialect_of_each_path_is_that_of_its_endpoint() -> None:
    for path, endpoint in ENDPOINTS.items():
        assert dialect_of(path) is endpoint.dialect
    for path in ("/v1//messages/", "/v1/messages/batches"):
        assert dialect_of(path) is Dialect.ANTHROPIC
    assert dialect_of("/v1/messagesx") is Dialect.OPENAI


@pytest.mark.parametrize(
    ("refusal", "status", "kind"),
    [
        (ModelNotFound("a", ["b"]), 404, "not_found_error"),
        (QueueFull("m", 2, 3.2), 429, "rate_limit_error"),
        (ServerBusy(4000), 503, "overloaded_error"),
        (QueueTimeout("m", "gpu:0", 300.0), 504, "timeout_error"),
    ],
)
def test_a_refusal_has_anthropics_shape_on_its_paths(refusal: Refusal, status: int, kind: str) -> None:
    got_status, headers, body = refusal_response(refusal, "r1", Dialect.ANTHROPIC)
    message = error(refusal_response(refusal, "r1")[2])["error"]["message"]
    assert got_status == status
    assert error(body) == {"type": "error", "error": {"type": kind, "message": message}, "request_id": "r1"}
    assert headers == refusal_response(refusal, "r1")[1]
    event = error_event(refusal, "r1", Dialect.ANTHROPIC)
    assert event == b"event: error\ndata: " + body + b"\n\n"


def test_http_errors_and_bugs_have_it_too() -> None:
    assert error(error_response(405, "no", "r1", Dialect.ANTHROPIC)[2])["error"]["type"] == "invalid_request_error"
    assert error(internal_error_response("r1", Dialect.ANTHROPIC)[2])["error"]["type"] == "api_error"


async def node_with(nursery: trio.Nursery, *acts: Act) -> InferenceNode:
    node = InferenceNode(UpstreamServers(nursery, *acts))
    await nursery.start(node.lane.run)
    return node


async def test_a_servers_error_is_translated_on_anthropics_paths_only(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    content = json.dumps({"error": TOO_LONG}).encode()
    act = Act(status=400, chunks=(content[:10], content[10:]))
    node = await node_with(nursery, act, act)
    chunks: list[bytes] = []
    answer = await node.serve(MESSAGES, chunks)
    assert answer.status == 400
    assert error(b"".join(chunks)) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": "too long"},
        "request_id": "r1",
    }
    assert (b"content-type", b"application/json") in answer.headers
    assert b"x-node-device" in dict(answer.headers)
    chunks = []
    answer = await node.serve(REQUEST, chunks)
    assert (answer.status, b"".join(chunks)) == (400, content)
    node.assert_nothing_is_held()


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ("input (4804 tokens) is too large to process. increase the physical batch size", 400),
        ('"prompt" must not be empty', 400),
        ("image input is not supported - hint: if this is unexpected, you may need to provide the mmproj", 400),
        ("[json.exception.type_error.302] type must be number, but is array", 400),
        ("vector::_M_range_check: __n (which is 70000) >= this->size() (which is 515)", 400),
        ('Failed to parse tools: Missing tool function: {"type":"function"}', 400),
        ("Failed to parse messages: Missing tool call type: 7", 400),
        ("Cannot use both json_schema and grammar", 400),
        ("Unknown reasoning format: x", 400),
        ("out of memory", 500),
    ],
)
async def test_a_500_for_what_is_wrong_with_the_request_is_a_400(
    message: str, status: int, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    content = json.dumps({"error": {"code": 500, "message": message, "type": "server_error"}}).encode()
    node = await node_with(nursery, Act(status=500, chunks=(content,)))
    chunks: list[bytes] = []
    answer = await node.serve(REQUEST, chunks)
    said = error(b"".join(chunks))["error"]
    assert (answer.status, said["code"], said["message"]) == (status, status, message)
    assert said["type"] == ("invalid_request_error" if status == 400 else "server_error")


async def test_an_error_that_is_no_json_is_told_in_the_shape_of_the_path(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    node = await node_with(nursery, Act(status=502, chunks=(b"<html>",)))
    said = error(await node.body(MESSAGES))["error"]
    assert said == {"type": "api_error", "message": "The server answered with status 502: <html>"}


async def test_an_error_without_a_word_is_told_in_the_shape_of_the_path(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    node = await node_with(nursery, Act(status=400, chunks=()))
    chunks: list[bytes] = []
    assert (await node.serve(REQUEST, chunks)).status == 400
    said = error(b"".join(chunks))["error"]
    assert (said["message"], said["type"]) == ("The server answered with status 400: nothing", "invalid_request_error")


async def test_a_stream_that_breaks_ends_with_anthropics_event(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    act = Act(chunks=(b"event: a\ndata: 1\n\n",), event_stream=True, loss=Loss.STOP, lost_after=1)
    node = await node_with(nursery, act)
    chunks: list[bytes] = []
    with pytest.raises(Exception, match="was stopped"):
        await node.serve(MESSAGES, chunks)
    assert chunks[-1].startswith(b'event: error\ndata: {"type": "error", "error": {"type": "overloaded_error"')


async def test_a_waiting_stream_gets_its_servers_error_as_anthropics_event(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    node = await node_with(nursery, Act(status=400, chunks=(json.dumps({"error": TOO_LONG}).encode(),), chunk_s=5.0))
    chunks: list[bytes] = []
    with pytest.raises(Exception, match="instead of a stream"):
        await node.serve(replace(MESSAGES, ping_s=1.0), chunks)
    assert chunks[0].startswith(b": ")
    event, data = chunks[-1].decode().strip().split("\n")
    assert event == "event: error"
    assert json.loads(data.removeprefix("data: "))["error"] == {"type": "invalid_request_error", "message": "too long"}
