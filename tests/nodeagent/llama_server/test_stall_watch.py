"""Servers that are at work and make no progress: the judge as a table, the watch in virtual time."""

import dataclasses
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.stall_watch import Signs, StallJudge, Worker, watch

COUNTS = ((1, 100, 5),)
STILL = Signs(0, in_flight=1, bytes_received=10, counts=COUNTS, cpu_s=7.0)


def silence(*changes: dict[str, object]) -> float:
    """For how long there was no sign of life after a look each 5 s, each differing from STILL by its change."""
    judge = StallJudge()
    seconds = 0.0
    for number, change in enumerate(changes):
        seconds = judge.observe(dataclasses.replace(STILL, at=5.0 * number, **change))  # type: ignore[arg-type]
    return seconds


def test_a_server_at_work_that_shows_nothing_is_silent_ever_longer() -> None:
    assert silence({}, {}, {}, {}) == 15


@pytest.mark.parametrize(
    "sign",
    [
        {"bytes_received": 11},
        {"counts": ((1, 612, 5),)},
        {"counts": ((1, 100, 6),)},
        {"cpu_s": 7.5},
    ],
)
def test_any_sign_of_life_ends_the_silence(sign: dict[str, object]) -> None:
    assert silence({}, {}, sign) == 0


def test_a_look_that_timed_out_is_no_evidence_for_or_against() -> None:
    assert silence({}, {"counts": None}, {"counts": None}) == 10
    assert silence({}, {"counts": None}, {"counts": ((1, 612, 5),)}) == 0
    assert silence({}, {"counts": None}, {}) == 10


def test_clients_that_lose_patience_and_come_back_are_no_sign_of_life() -> None:
    gone: dict[str, object] = {"in_flight": 0}
    assert silence({}, {}, {"in_flight": 2}, {"in_flight": 3}, {}) == 20
    assert silence({}, {}, {}, gone) == 0
    assert silence({}, {}, {}, gone, gone, gone, {}, {}) == 15
    assert silence({}, {}, {}, gone, {"bytes_received": 11}, {"bytes_received": 11}) == 5


def test_what_was_not_looked_at_is_no_evidence() -> None:
    judge = StallJudge()
    for at in (0.0, 5.0, 905.0, 910.0):
        silent_s = judge.observe(dataclasses.replace(STILL, at=at))
    assert silent_s == 10


def test_a_server_without_requests_is_never_silent() -> None:
    idle: list[dict[str, object]] = [{"in_flight": 0}] * 50
    assert silence(*idle) == 0


def test_cpu_time_that_hardly_moves_is_that_of_a_server_that_answers_probes() -> None:
    assert silence({}, {"cpu_s": 7.01}, {"cpu_s": 7.02}) == 10


async def watched(signs_at: Callable[[float, bool], Signs], seconds: float) -> list[tuple[float, str]]:
    failed: list[tuple[float, str]] = []
    worker = Worker("gpu:0/m", 3, 1, Upstream("127.0.0.1:1", "key"), 120.0, counts_cpu=False)

    async def looks(_worker: Worker, *, with_counts: bool) -> Signs:
        return signs_at(trio.current_time(), with_counts)

    def fail(child_id: str, generation: int, reason: str) -> None:
        assert (child_id, generation) == ("gpu:0/m", 3)
        failed.append((trio.current_time(), reason))

    with trio.move_on_after(seconds):
        await watch(lambda: [] if failed else [worker], fail, looks=looks)
    return failed


async def test_a_stalled_server_is_failed_at_its_timeout_and_once(autojump_clock: MockClock) -> None:
    def hung(now: float, with_counts: bool) -> Signs:
        return Signs(now, 1, 10, COUNTS if with_counts else None)

    [(at, reason)] = await watched(hung, 1000)
    assert at == pytest.approx(125)
    assert reason == "no sign of progress for 120 s with 1 requests in flight (stall_timeout_s)"


async def test_a_long_prompt_evaluation_on_a_gpu_is_no_stall(autojump_clock: MockClock) -> None:
    def evaluating(now: float, with_counts: bool) -> Signs:
        # A batch takes 100 s, and while it runs the server answers no look.
        in_batch = now % 100 > 6
        return Signs(now, 1, 10, None if in_batch or not with_counts else ((1, 512 * int(now // 100), 0),))

    assert await watched(evaluating, 3600) == []


async def test_slots_are_not_asked_while_bytes_flow(autojump_clock: MockClock) -> None:
    asked = []

    def flowing(now: float, with_counts: bool) -> Signs:
        asked.append(with_counts)
        return Signs(now, 1, int(now))

    assert await watched(flowing, 300) == []
    assert asked[0]
    assert not any(asked[1:])
