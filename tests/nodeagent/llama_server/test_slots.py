"""Saving and restoring a slot, as llama-server's API has it."""

import json

import pytest
import trio

from fakes.http_stub import Respond, response, start_http_stub
from nodeagent.errors import UpstreamLost
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.slots import restore_slot, save_slot


async def upstream_to(nursery: trio.Nursery, respond: Respond) -> Upstream:
    return Upstream(await start_http_stub(nursery, respond), "key")


async def test_a_slot_is_saved_to_and_restored_from_the_named_file(nursery: trio.Nursery) -> None:
    requests = []

    def respond(request_line: str, body: str) -> bytes:
        requests.append((request_line, json.loads(body)))
        return response('{"id_slot": 1, "n_saved": 1500, "n_written": 35000000, "n_restored": 1499}')

    upstream = await upstream_to(nursery, respond)
    with trio.fail_after(5):
        assert await save_slot(upstream, 1, "file.kv") == (1500, 35_000_000)
        assert await restore_slot(upstream, 1, "file.kv") == 1499
    assert requests == [
        ("POST /slots/1?action=save HTTP/1.1", {"filename": "file.kv"}),
        ("POST /slots/1?action=restore HTTP/1.1", {"filename": "file.kv"}),
    ]
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (response('{"error": {"message": "no such file"}}', status=400), r"400 .*no such file"),
        (response("busy", status=503), "503 busy"),
        (response("not JSON"), "200 not JSON .*malformed"),
        (response("[]"), r"200 \[\]"),
        (b"", "closed the connection"),
    ],
    ids=["refused", "busy", "no JSON", "no object", "closed"],
)
async def test_any_other_response_is_an_error_that_names_the_action_and_the_slot(
    reply: bytes, reason: str, nursery: trio.Nursery
) -> None:
    upstream = await upstream_to(nursery, lambda _request_line, _body: reply)
    with trio.fail_after(5):
        with pytest.raises(UpstreamLost, match=f"save of slot 0: .*{reason}"):
            await save_slot(upstream, 0, "file.kv")
        with pytest.raises(UpstreamLost, match=f"restore of slot 2: .*{reason}"):
            await restore_slot(upstream, 2, "file.kv")
    nursery.cancel_scope.cancel()


async def test_a_server_that_is_gone_is_an_error() -> None:
    with trio.fail_after(5), pytest.raises(UpstreamLost, match="save of slot 0: the connection failed"):
        await save_slot(Upstream("127.0.0.1:1", "key"), 0, "file.kv")
