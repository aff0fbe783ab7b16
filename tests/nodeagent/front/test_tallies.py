"""What is counted of each request."""

import pytest
import trio
from trio.testing import MockClock

from nodeagent.errors import QueueFull
from nodeagent.front.tallies import Histogram, RequestTally, Tallies

TIMINGS = b'"timings":{"cache_n":3,"prompt_n":5,"prompt_ms":1.0,"predicted_n":7,"predicted_per_token_ms":20.5}'


def test_an_observation_is_in_the_bucket_whose_bound_it_does_not_exceed() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(value)
    assert (histogram.counts, histogram.sum) == ([2, 1, 1], 12.0)


async def test_a_complete_request_counts_with_its_times_and_tokens(autojump_clock: MockClock) -> None:
    tallies = Tallies()
    tally = RequestTally(tallies, "a")
    await trio.sleep(1)
    tally.granted(0.75)
    tally.answered(200)
    tally.passed(b'{"content": "...", ' + TIMINGS + b"}")
    await trio.sleep(2)
    tally.completed()
    tally.close()
    assert tallies.requests == {("a", 200, ""): 1}
    assert (tallies.first_token_s["a"].sum, tallies.duration_s["a"].sum) == (1, 3)
    assert (tallies.queue_wait_s["a"].sum, tallies.per_token_s["a"].sum) == (0.75, 0.0205)
    tokens = (tallies.prompt_tokens["a"], tallies.cached_tokens["a"], tallies.generated_tokens["a"])
    assert tokens == (5, 3, 7)


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
    tally = RequestTally(tallies, "a")
    for chunk in chunks:
        tally.passed(chunk)
    tally.close()
    assert tallies.generated_tokens["a"] == 7


@pytest.mark.parametrize(
    "chunk", [b'{"content":"\\"predicted_n\\":99"}', b'{"predicted_n":1.2.3}', b'{"predicted_n":null}', b"", b"\xff"]
)
async def test_what_a_model_writes_is_not_counted(chunk: bytes, autojump_clock: MockClock) -> None:
    tallies = Tallies()
    tally = RequestTally(tallies, "a")
    tally.passed(chunk)
    tally.close()
    assert tallies.generated_tokens["a"] == 0


async def test_a_request_that_is_not_answered_completely_counts_with_the_reason(autojump_clock: MockClock) -> None:
    tallies = Tallies()
    left, cut, refused = (RequestTally(tallies, "a") for _ in range(3))
    cut.answered(200)
    cut.lost()
    refused.refused(QueueFull("a", 2, 1.0))
    for tally in (left, cut, refused):
        tally.close()
    assert tallies.requests == {
        ("a", 499, "client_left"): 1,
        ("a", 200, "server_lost"): 1,
        ("a", 429, "queue_full"): 1,
    }
