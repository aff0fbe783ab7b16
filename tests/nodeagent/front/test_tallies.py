"""What is counted of each request."""

import gc
import weakref

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.inference_node import REQUEST
from nodeagent.access.gate import Account
from nodeagent.access.limits import Limits, Meter, Sums
from nodeagent.config import ApiKeyConfig
from nodeagent.errors import InvalidApiKey, ModelNotFound, QueueFull
from nodeagent.front.accounts import account_var
from nodeagent.front.activity import as_json
from nodeagent.front.tallies import RequestTally, Tallies
from nodeagent.histogram import Histogram

TIMINGS = b'"timings":{"cache_n":3,"prompt_n":5,"prompt_ms":1.0,"predicted_n":7,"predicted_per_token_ms":20.5}'


def test_an_observation_is_in_the_bucket_whose_bound_it_does_not_exceed() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert (histogram.counts, histogram.sum) == ([2, 1, 1], 12.0)


async def test_a_complete_request_counts_with_its_times_and_tokens(autojump_clock: MockClock) -> None:
    tallies = Tallies()
    tally = RequestTally(tallies, REQUEST)
    await trio.sleep(1)
    tally.granted("cpu:0", 0.75, 0.25)
    tally.answered(200)
    tally.passed(b'{"content": "...", ' + TIMINGS + b"}")
    await trio.sleep(2)
    tally.completed()
    tally.close()
    assert tallies.settled.requests == {("a", 200, ""): 1}
    assert (tallies.first_token_s["a"].sum, tallies.settled.duration_s["a"].sum) == (1, 3)
    assert (tallies.queue_wait_s["a"].sum, tallies.settled.per_token_s["a"].sum) == (0.75, 0.0205)
    sums = tallies.settled
    assert (sums.prompt_tokens["a"], sums.cached_tokens["a"], sums.generated_tokens["a"]) == (5, 3, 7)


@pytest.mark.parametrize(
    "chunks",
    [
        [b"data: {" + TIMINGS + b"}\n\ndata: [DONE]\n\n"],
        [b"data: {" + TIMINGS + b"}\n\n", b"data: [DONE]\n\n"],
        [b"data: {}\n\n" * 10_000 + b"data: {" + TIMINGS + b"}\n\n", b"", b"data: [DONE]\n\n", b""],
    ],
)
async def test_the_tokens_of_a_stream_are_in_one_of_its_last_events(
    chunks: list[bytes], autojump_clock: MockClock
) -> None:
    tallies = Tallies()
    tally = RequestTally(tallies, REQUEST)
    for chunk in chunks:
        tally.passed(chunk)
    tally.close()
    assert tallies.settled.generated_tokens["a"] == 7


@pytest.mark.parametrize(
    "chunk", [b'{"content":"\\"predicted_n\\":99"}', b'{"predicted_n":1.2.3}', b'{"predicted_n":null}', b"", b"\xff"]
)
async def test_what_a_model_writes_is_not_counted(chunk: bytes, autojump_clock: MockClock) -> None:
    tallies = Tallies()
    tally = RequestTally(tallies, REQUEST)
    tally.passed(chunk)
    tally.close()
    assert tallies.settled.generated_tokens["a"] == 0


async def test_a_request_that_is_not_answered_completely_counts_with_the_reason(autojump_clock: MockClock) -> None:
    tallies = Tallies()
    left, cut, refused = (RequestTally(tallies, REQUEST) for _ in range(3))
    cut.answered(200)
    cut.lost()
    refused.refused(QueueFull("a", 2, 1.0))
    for tally in (left, cut, refused):
        tally.close()
    assert tallies.settled.requests == {
        ("a", 499, "client_left"): 1,
        ("a", 200, "server_lost"): 1,
        ("a", 429, "queue_full"): 1,
    }


async def test_requests_in_flight_whose_answers_are_not_streamed_are_known(autojump_clock: MockClock) -> None:
    tallies = Tallies()
    whole, queued, stream = (RequestTally(tallies, replace(REQUEST, streamed=it)) for it in (False, False, True))
    whole.granted("cpu:0", 0.0, 0.0)
    whole.granted("cpu:0", 0.0, 0.0)  # again, after its server was lost
    stream.granted("cpu:0", 0.0, 0.0)
    assert tallies.whole_in_flight["a"] == 1
    for tally in (queued, stream, whole):
        tally.close()
    assert tallies.whole_in_flight["a"] == 0


async def test_a_complete_request_is_a_record_of_what_it_took(autojump_clock: MockClock) -> None:
    tallies = Tallies()
    headers = [(b"user-agent", b"curl/8 \x1b[31m" + b"x" * 500)]
    tally = RequestTally(tallies, replace(REQUEST, headers=headers, streamed=True))
    tally.granted("cpu:0", 0.5, 0.25)
    await trio.sleep(1)
    tally.answered(200)
    tally.passed(b"data: {" + TIMINGS + b"}\n\n")
    await trio.sleep(1)
    tally.completed()
    tally.close()
    [record] = tallies.activity.newest(lambda _: True, limit=9)
    shown = as_json(record)
    assert list(shown)[:4] == ["id", "request_id", "time", "path"]
    assert (shown["id"], shown["request_id"], shown["path"]) == (1, "r1", "/v1/chat/completions")
    assert (shown["model_id"], shown["device_id"], shown["status"], shown["error"]) == ("a", "cpu:0", 200, None)
    assert (shown["queue_ms"], shown["load_ms"]) == (500, 250)
    assert (shown["first_token_ms"], shown["duration_ms"]) == (1000, 2000)
    assert (shown["prompt_tokens"], shown["cached_tokens"], shown["completion_tokens"]) == (8, 3, 7)
    assert (shown["tokens_per_s"], shown["streamed"], shown["key_name"]) == (48.78, True, None)
    assert shown["user_agent"].startswith("curl/8 ?[31mxxx")
    assert len(shown["user_agent"]) == 200


async def test_requests_that_fail_are_records_with_the_reason(autojump_clock: MockClock) -> None:
    tallies = Tallies()
    left, cut, refused = (RequestTally(tallies, REQUEST) for _ in range(3))
    left.answered(200)
    cut.answered(200)
    cut.lost()
    full = QueueFull("a", 2, 1.0)
    refused.refused(full)
    for tally in (left, cut, refused):
        tally.close()
    early = ModelNotFound("b", ["a"])
    for refusal in (full, early, InvalidApiKey(is_missing=True)):
        tallies.refused_early("/v1/embeddings", "r2", [(b"user-agent", b"x")], refusal)
    found = tallies.activity.newest(lambda _: True, limit=9)
    assert [(record.id, record.status, record.error) for record in found] == [
        (4, 404, "model_not_found"),
        (3, 429, "queue_full"),
        (2, 200, "server_lost"),
        (1, 499, "client_left"),
    ]
    assert (found[0].path, found[0].model_id, found[0].user_agent) == ("/v1/embeddings", None, "x")


async def test_the_tokens_of_a_request_count_for_its_key_also_if_it_is_cut_short(autojump_clock: MockClock) -> None:
    entry = ApiKeyConfig(name="alice", sha256="0" * 64)
    account = Account(entry, Meter(Limits(), 0.0), Sums(), lambda: "2026-03-02")
    account_var.set(account)
    tallies = Tallies()
    whole, cut = RequestTally(tallies, REQUEST), RequestTally(tallies, REQUEST)
    whole.passed(b"{" + TIMINGS + b"}")
    whole.completed()
    for _ in range(5):
        cut.passed(b"data: {}\n\n")
    whole.close()
    cut.close()
    tallies.settle()
    assert (account.sums.prompt_tokens, account.sums.generated_tokens, account.sums.tokens_of_day) == (8, 12, 20)
    assert {record.key_name for record in tallies.activity.newest(lambda _: True, limit=9)} == {"alice"}


async def test_the_tokens_of_a_key_with_a_quota_count_at_once(autojump_clock: MockClock) -> None:
    entry = ApiKeyConfig(name="alice", sha256="0" * 64, tokens_per_day=100)
    account = Account(entry, Meter(Limits(tokens_per_day=100), 0.0), Sums(), lambda: "2026-03-02")
    account_var.set(account)
    tally = RequestTally(Tallies(), REQUEST)
    tally.passed(b"{" + TIMINGS + b"}")
    tally.close()
    assert account.sums.tokens_of_day == 15


async def test_requests_that_have_ended_keep_no_body_of_theirs(autojump_clock: MockClock) -> None:
    tallies = Tallies()
    request, answer = replace(REQUEST, body=bytes(10**6)), b"{" + TIMINGS + b"}" + b" " * 10**6
    tally = RequestTally(tallies, request)
    tally.passed(answer)
    tally.completed()
    tally.close()
    held = list(vars(tally).values())
    assert max(len(it) for it in held if isinstance(it, bytes)) <= 4096
    assert not any(it is request for it in held)


async def test_whoever_waits_for_the_next_record_gets_it_at_once(autojump_clock: MockClock) -> None:
    tallies, seen = Tallies(), list[int]()

    async def watch() -> None:
        await tallies.activity.more_than(0)
        seen.append(tallies.activity.last_id)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        await wait_all_tasks_blocked()
        RequestTally(tallies, REQUEST).close()
        with trio.fail_after(1):
            await wait_all_tasks_blocked()
        assert seen == [1]


async def test_many_requests_that_have_ended_do_not_pile_up(autojump_clock: MockClock) -> None:
    tallies = Tallies()
    kept = [RequestTally(tallies, REQUEST) for _ in range(1000)]
    for tally in kept:
        tally.close()
    gone = weakref.ref(kept[0])
    kept.clear()
    del tally
    gc.collect()
    assert gone() is None
    assert tallies.settled.requests == {("a", 499, "client_left"): 1000}
    assert tallies.activity.last_id == 1000
