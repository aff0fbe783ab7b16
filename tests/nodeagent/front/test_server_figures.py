"""What servers tell in figures, with servers that answer by a script."""

import math
from collections.abc import Iterator
from typing import Any, cast

import msgspec
import pytest
import trio
from trio.testing import MockClock

from nodeagent.errors import BackendUnavailable
from nodeagent.front.server_figures import COUNTERS, ServerFigures, counters_in
from nodeagent.front.tallies import Tallies
from nodeagent.front.window import Window
from nodeagent.llama_server.relay import Upstream


class FakeWindow:
    """Answers for each server what `answers` says, an exception too; `asked` are the models that were asked for."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: list[str] = []

    async def look(self, model_id: str, _server: Upstream) -> tuple[int, bytes]:
        self.asked.append(model_id)
        answer = self.answers[model_id]
        if answer == "hangs":
            await trio.sleep_forever()
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return answer, b"{}"
        return 200, answer if isinstance(answer, bytes) else msgspec.json.encode(answer)


class FakeScheduler:
    def __init__(self) -> None:
        self.servers = {("gpu:0", "a"): Upstream("127.0.0.1:1", "key"), ("gpu:1", "b"): Upstream("127.0.0.1:2", "key")}

    def ready_servers(self) -> Iterator[tuple[str, str, Upstream]]:
        return ((device_id, model_id, server) for (device_id, model_id), server in self.servers.items())


class Case:
    def __init__(self) -> None:
        self.window, self.metrics = FakeWindow(), FakeWindow()
        self.scheduler, self.tallies = FakeScheduler(), Tallies()
        self.metrics.answers = {"a": told(5), "b": told(0)}
        self.window.answers = {"a": [slot(256, 100), slot(256, 200, busy=False)], "b": [slot(1024, 400)]}
        windows = cast(Window, self.window), cast(Window, self.metrics)
        self.figures = ServerFigures(cast(Any, self.scheduler), self.tallies, *windows)


def told(value: float) -> bytes:
    return "".join(
        f"# TYPE llamacpp:{name} counter\nllamacpp:{name} {value:g}\n" for name in (*COUNTERS.values(), "other_total")
    ).encode()


def slot(n_ctx: int, tokens: int, *, busy: bool = True) -> dict[str, Any]:
    return {"id": 0, "n_ctx": n_ctx, "is_processing": busy, "n_prompt_tokens": tokens}


async def test_the_tokens_of_requests_in_progress_count(autojump_clock: MockClock) -> None:
    case = Case()
    assert case.figures.cache_use() == (0.0, {})
    await case.figures.refresh()
    assert case.figures.cache_use() == (500 / 1536, {("gpu:0", "a"): 100 / 512, ("gpu:1", "b"): 400 / 1024})


async def test_a_server_with_an_answer_in_progress_that_is_not_streamed_is_not_asked(autojump_clock: MockClock) -> None:
    case = Case()
    case.tallies.whole_in_flight["b"] += 1
    await case.figures.refresh()
    assert case.window.asked == ["a"]
    assert case.figures.cache_use() == (100 / 512, {("gpu:0", "a"): 100 / 512})


@pytest.mark.parametrize(
    "answer", [501, b"not json", {"error": "x"}, [], [slot(0, 1)], BackendUnavailable("b", "gone"), "hangs"]
)
async def test_what_a_server_does_not_tell_is_left_out_or_stays_as_it_was(
    autojump_clock: MockClock, answer: object
) -> None:
    case = Case()
    case.window.answers["b"] = answer
    began = trio.current_time()
    await case.figures.refresh()
    assert trio.current_time() - began == (1 if answer == "hangs" else 0)
    assert case.figures.cache_use()[1].keys() == {("gpu:0", "a")}
    case.window.answers["b"] = [slot(1000, 400)]
    await case.figures.refresh()
    case.window.answers["b"] = answer
    await case.figures.refresh()
    assert case.figures.cache_use()[1]["gpu:1", "b"] == 0.4


async def test_no_ratio_is_out_of_bounds_and_that_of_a_server_ends_with_it(autojump_clock: MockClock) -> None:
    case = Case()
    case.window.answers = {"a": [slot(256, 300)], "b": [slot(256, -5), slot(-256, 5)]}
    await case.figures.refresh()
    assert case.figures.cache_use() == (0.5, {("gpu:0", "a"): 1.0, ("gpu:1", "b"): 0.0})
    case.scheduler.servers[("gpu:0", "a")] = Upstream("127.0.0.1:3", "key")
    assert case.figures.cache_use() == (0.0, {("gpu:1", "b"): 0.0})


async def test_counters_of_one_server_after_the_other_are_summed_up(autojump_clock: MockClock) -> None:
    case = Case()
    place = ("gpu:0", "a")
    await case.figures.refresh()
    case.metrics.answers["a"] = told(7)
    await case.figures.refresh()
    assert case.figures.counters == {place: dict.fromkeys(COUNTERS, 7), ("gpu:1", "b"): dict.fromkeys(COUNTERS, 0)}
    case.scheduler.servers[place] = Upstream("127.0.0.1:3", "key")
    case.metrics.answers["a"] = told(2)
    await case.figures.refresh()
    await case.figures.refresh()
    assert case.figures.counters[place] == dict.fromkeys(COUNTERS, 9)
    del case.scheduler.servers[place]
    await case.figures.refresh()
    assert case.figures.counters[place] == dict.fromkeys(COUNTERS, 9)


ANSWERS = (b"", b"\xff\n", 501, told(math.nan), told(math.inf), told(1), b"llamacpp:n_decode_total")


@pytest.mark.parametrize("answer", ANSWERS)
async def test_no_counter_goes_back_whatever_a_server_tells(autojump_clock: MockClock, answer: object) -> None:
    case = Case()
    await case.figures.refresh()
    case.metrics.answers["a"] = answer
    await case.figures.refresh()
    assert case.figures.counters["gpu:0", "a"] == dict.fromkeys(COUNTERS, 5)


def test_counters_are_read_by_their_names() -> None:
    assert counters_in(told(3)) == dict.fromkeys(COUNTERS, 3)
    assert counters_in(b"llamacpp:prompt_seconds_total 0.25\nllamacpp:prompt_seconds 9\n") == {"prompt_seconds": 0.25}
