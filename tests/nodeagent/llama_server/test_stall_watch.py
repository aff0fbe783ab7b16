"""Busy servers that make no progress: the detector as a table, the watch in virtual time."""

import os
from collections.abc import Callable

import msgspec
import pytest
import trio
from trio.testing import MockClock

from fakes.http_stub import response, start_http_stub
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.stall_watch import OBSERVE_INTERVAL_S, Observation, StallDetector, Worker, observe, watch

COUNTS = ((1, 100, 5),)
STILL = Observation(at=0, awaited=1, bytes_received=10, counts=COUNTS, cpu_s=7.0)


def stalled_s(*changes: dict[str, object]) -> float:
    """How long there was no progress after an observation every 5 s, each being STILL with one of the changes."""
    detector = StallDetector()
    seconds = 0.0
    for number, change in enumerate(changes):
        seconds = detector.add(msgspec.structs.replace(STILL, at=5.0 * number, **change))
    return seconds


def test_the_time_without_progress_adds_up_while_the_server_is_busy() -> None:
    assert stalled_s({}, {}, {}, {}) == 15


@pytest.mark.parametrize(
    "sign",
    [
        {"bytes_received": 11},
        {"counts": ((1, 612, 5),)},
        {"counts": ((1, 100, 6),)},
        {"cpu_s": 7.5},
    ],
)
def test_any_sign_of_progress_resets_the_time(sign: dict[str, object]) -> None:
    assert stalled_s({}, {}, sign) == 0


def test_an_observation_without_counts_is_no_evidence_for_or_against() -> None:
    assert stalled_s({}, {"counts": None}, {"counts": None}) == 10
    assert stalled_s({}, {"counts": None}, {"counts": ((1, 612, 5),)}) == 0
    assert stalled_s({}, {"counts": None}, {}) == 10


def test_clients_that_give_up_and_retry_are_no_sign_of_progress() -> None:
    gone: dict[str, object] = {"awaited": 0}
    assert stalled_s({}, {}, {"awaited": 2}, {"awaited": 3}, {}) == 20
    assert stalled_s({}, {}, {}, gone) == 0
    assert stalled_s({}, {}, {}, gone, gone, gone, {}, {}) == 15
    assert stalled_s({}, {}, {}, gone, {"bytes_received": 11}, {"bytes_received": 11}) == 5


def test_a_long_gap_between_two_observations_is_no_evidence() -> None:
    detector = StallDetector()
    for at in (0.0, 5.0, 905.0, 910.0):
        seconds = detector.add(msgspec.structs.replace(STILL, at=at))
    assert seconds == 10


def test_a_server_without_requests_never_stalls() -> None:
    idle: list[dict[str, object]] = [{"awaited": 0}] * 50
    assert stalled_s(*idle) == 0


def test_the_little_cpu_time_that_probes_use_is_no_sign_of_progress() -> None:
    assert stalled_s({}, {"cpu_s": 7.01}, {"cpu_s": 7.02}) == 10


def worker(upstream: Upstream, *, generation: int = 3, pid: int = 1, counts_cpu: bool = False) -> Worker:
    return Worker(
        child_id="gpu:0/m",
        generation=generation,
        pid=pid,
        upstream=upstream,
        stall_timeout_s=120.0,
        counts_cpu=counts_cpu,
    )


async def watched(
    seen_at: Callable[[float, bool], Observation], seconds: float, *, awaited: int = 0
) -> list[tuple[float, str]]:
    failed: list[tuple[float, str]] = []
    watched = worker(Upstream("127.0.0.1:1", "key"))
    watched.upstream.awaited = awaited

    async def observe(_worker: Worker, *, with_counts: bool) -> Observation:
        return seen_at(trio.current_time(), with_counts)

    def fail(child_id: str, generation: int, reason: str) -> None:
        assert (child_id, generation) == ("gpu:0/m", 3)
        failed.append((trio.current_time(), reason))

    with trio.move_on_after(seconds):
        await watch(lambda: [] if failed else [watched], fail, observe=observe)
    return failed


async def test_a_stalled_server_is_failed_at_its_timeout_and_once(autojump_clock: MockClock) -> None:
    def hung(now: float, with_counts: bool) -> Observation:
        return Observation(at=now, awaited=1, bytes_received=10, counts=COUNTS if with_counts else None)

    [(at, reason)] = await watched(hung, 1000)
    assert at == pytest.approx(125)
    assert reason == "no sign of progress for 120 s with 1 requests in flight (stall_timeout_s)"


async def test_a_long_prompt_evaluation_on_a_gpu_is_no_stall(autojump_clock: MockClock) -> None:
    def evaluating(now: float, with_counts: bool) -> Observation:
        # A batch takes 100 s, and meanwhile the server does not answer.
        in_batch = now % 100 > 6
        counts = None if in_batch or not with_counts else ((1, 512 * int(now // 100), 0),)
        return Observation(at=now, awaited=1, bytes_received=10, counts=counts)

    assert await watched(evaluating, 3600) == []


async def test_the_server_is_not_asked_for_its_slots_while_bytes_flow(autojump_clock: MockClock) -> None:
    asked = []

    def flowing(now: float, with_counts: bool) -> Observation:
        asked.append(with_counts)
        return Observation(at=now, awaited=1, bytes_received=int(now))

    assert await watched(flowing, 300) == []
    assert asked[0]
    assert not any(asked[1:])


@pytest.mark.parametrize("error", [RuntimeError, RecursionError, OverflowError, UnicodeError, None])
async def test_a_server_that_can_not_be_observed_does_not_keep_another_from_being_watched(
    error: type[Exception] | None, autojump_clock: MockClock
) -> None:
    strange, hung = Upstream("127.0.0.1:1", "key"), Upstream("127.0.0.1:2", "key")
    hung.awaited = 1
    both = [worker(strange), msgspec.structs.replace(worker(hung), child_id="gpu:1/m")]
    failed = []

    async def observe(seen: Worker, *, with_counts: bool) -> Observation:
        if seen.upstream is hung:
            return Observation(at=trio.current_time(), awaited=1, bytes_received=0, counts=COUNTS)
        if error is not None:
            raise error("unforeseen")
        await trio.sleep_forever()
        raise AssertionError

    with trio.move_on_after(140):
        await watch(lambda: both, lambda child_id, *_rest: failed.append(child_id), observe=observe)
    assert set(failed) == {"gpu:1/m"}


async def test_a_server_that_answers_nothing_readable_is_failed_while_it_is_busy(autojump_clock: MockClock) -> None:
    def unreadable(_now: float, _with_counts: bool) -> Observation:
        raise UnicodeError("unforeseen")

    [(at, _reason)] = await watched(unreadable, 1000, awaited=1)
    assert at == pytest.approx(125)


async def test_a_new_generation_starts_from_zero(autojump_clock: MockClock) -> None:
    failed = []
    upstream = Upstream("127.0.0.1:1", "key")

    def workers() -> list[Worker]:
        # A server that is replaced every 100 s, and is not there for a moment.
        generation, second = divmod(trio.current_time() - began, 100)
        return [worker(upstream, generation=int(generation))] if second > OBSERVE_INTERVAL_S else []

    async def hung(_worker: Worker, *, with_counts: bool) -> Observation:
        return Observation(at=trio.current_time(), awaited=1, bytes_received=0, counts=COUNTS)

    began = trio.current_time()
    with trio.move_on_after(1000):
        await watch(workers, lambda *failure: failed.append(failure), observe=hung)
    assert failed == []


SLOTS = """[
    {"id": 0, "id_task": 7, "n_prompt_tokens_processed": 512, "next_token": [{"n_decoded": 3}]},
    {"id": 1, "next_token": []}
]"""


async def test_the_counts_of_all_slots_are_observed(nursery: trio.Nursery) -> None:
    requests = []

    def respond(request_line: str, _body: str) -> bytes:
        requests.append(request_line)
        return response(SLOTS)

    upstream = Upstream(await start_http_stub(nursery, respond), "key")
    upstream.awaited, upstream.bytes_received = 2, 100
    with trio.fail_after(5):
        with_counts = await observe(worker(upstream), with_counts=True)
        assert (with_counts.counts, with_counts.cpu_s) == (((7, 512, 3), (0, 0, 0)), None)
        assert (with_counts.awaited, with_counts.bytes_received) == (2, 100)
        assert (await observe(worker(upstream), with_counts=False)).counts is None
    assert requests == ["GET /slots HTTP/1.1"]
    nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "reply",
    [
        response("not JSON"),
        response('{"error": {"code": 503}}', status=503),
        response("7"),
        response('[{"next_token": 7}]'),
        response('[{"id_task": "x"}]'),
        b"",
    ],
    ids=["no JSON", "error", "no list", "no list of tokens", "no number", "closed"],
)
async def test_a_server_that_does_not_tell_its_slots_has_no_counts(reply: bytes, nursery: trio.Nursery) -> None:
    upstream = Upstream(await start_http_stub(nursery, lambda _request_line, _body: reply), "key")
    with trio.fail_after(5):
        assert (await observe(worker(upstream), with_counts=True)).counts is None
    nursery.cancel_scope.cancel()


async def test_a_server_that_does_not_answer_in_time_has_no_counts(nursery: trio.Nursery) -> None:
    upstream = Upstream(await start_http_stub(nursery, lambda _request_line, _body: None), "key")
    with trio.fail_after(10):
        assert (await observe(worker(upstream), with_counts=True)).counts is None
    nursery.cancel_scope.cancel()


async def test_the_cpu_time_of_a_process_grows_with_its_work_and_is_unknown_once_it_is_gone() -> None:
    this = worker(Upstream("127.0.0.1:1", "key"), pid=os.getpid(), counts_cpu=True)
    before = (await observe(this, with_counts=False)).cpu_s
    assert before is not None
    with trio.fail_after(30):
        while ((await observe(this, with_counts=False)).cpu_s or 0.0) <= before:
            sum(range(100_000))
    gone = worker(Upstream("127.0.0.1:1", "key"), pid=2**22 + 1, counts_cpu=True)
    assert (await observe(gone, with_counts=False)).cpu_s is None
