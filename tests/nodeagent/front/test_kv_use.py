"""The use of the KV caches, with servers that answer by a script."""

from collections.abc import Iterator
from typing import Any, cast

import msgspec
import pytest
import trio
from trio.testing import MockClock

from nodeagent.errors import BackendUnavailable
from nodeagent.front.kv_use import KvUse
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
        self.window, self.scheduler, self.tallies = FakeWindow(), FakeScheduler(), Tallies()
        self.window.answers = {"a": [slot(256, 100), slot(256, 200, busy=False)], "b": [slot(1024, 400)]}
        self.kv_use = KvUse(cast(Any, self.scheduler), self.tallies, cast(Window, self.window))


def slot(n_ctx: int, tokens: int, *, busy: bool = True) -> dict[str, Any]:
    return {"id": 0, "n_ctx": n_ctx, "is_processing": busy, "n_prompt_tokens": tokens}


async def test_the_tokens_of_requests_in_progress_count(autojump_clock: MockClock) -> None:
    case = Case()
    assert case.kv_use.ratios() == (0.0, {})
    await case.kv_use.refresh()
    assert case.kv_use.ratios() == (500 / 1536, {("gpu:0", "a"): 100 / 512, ("gpu:1", "b"): 400 / 1024})


async def test_a_server_with_an_answer_in_progress_that_is_not_streamed_is_not_asked(autojump_clock: MockClock) -> None:
    case = Case()
    case.tallies.whole_in_flight["b"] += 1
    await case.kv_use.refresh()
    assert case.window.asked == ["a"]
    assert case.kv_use.ratios() == (100 / 512, {("gpu:0", "a"): 100 / 512})


@pytest.mark.parametrize(
    "answer", [501, b"not json", {"error": "x"}, [], [slot(0, 1)], BackendUnavailable("b", "gone"), "hangs"]
)
async def test_what_a_server_does_not_tell_is_left_out_or_stays_as_it_was(
    autojump_clock: MockClock, answer: object
) -> None:
    case = Case()
    case.window.answers["b"] = answer
    began = trio.current_time()
    await case.kv_use.refresh()
    assert trio.current_time() - began == (1 if answer == "hangs" else 0)
    assert case.kv_use.ratios()[1].keys() == {("gpu:0", "a")}
    case.window.answers["b"] = [slot(1000, 400)]
    await case.kv_use.refresh()
    case.window.answers["b"] = answer
    await case.kv_use.refresh()
    assert case.kv_use.ratios()[1]["gpu:1", "b"] == 0.4


async def test_no_ratio_is_out_of_bounds_and_that_of_a_server_ends_with_it(autojump_clock: MockClock) -> None:
    case = Case()
    case.window.answers = {"a": [slot(256, 300)], "b": [slot(256, -5), slot(-256, 5)]}
    await case.kv_use.refresh()
    assert case.kv_use.ratios() == (0.5, {("gpu:0", "a"): 1.0, ("gpu:1", "b"): 0.0})
    case.scheduler.servers[("gpu:0", "a")] = Upstream("127.0.0.1:3", "key")
    assert case.kv_use.ratios() == (0.0, {("gpu:1", "b"): 0.0})
