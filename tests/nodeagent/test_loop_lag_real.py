"""The lag of a real event loop, and the step that is named for it."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
import trio

from nodeagent import loop_lag
from nodeagent.histogram import Histogram
from nodeagent.loop_lag import BOUNDS_S, LoopLag, step_of


@asynccontextmanager
async def watched() -> AsyncIterator[Histogram]:
    seconds = Histogram(BOUNDS_S)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(LoopLag(seconds).run)
        yield seconds
        nursery.cancel_scope.cancel()


def above(seconds: Histogram, bound_s: float) -> int:
    return sum(seconds.counts[seconds.bounds.index(bound_s) + 1 :])


def slow() -> None:
    json.loads(json.dumps("x"), object_hook=None)
    time.sleep(0.6)


async def slow_task() -> None:
    slow()


async def test_an_idle_loop_is_hardly_late_and_nothing_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with watched() as seconds:
        await trio.sleep(1)
    assert sum(seconds.counts) >= 3
    assert seconds.sum < 0.5
    assert caplog.messages == []


async def test_a_step_that_holds_up_the_loop_is_counted_and_named_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with watched() as seconds, trio.open_nursery() as nursery:
        for _ in range(2):
            await trio.sleep(0.05)
            nursery.start_soon(slow_task)
            await trio.sleep(0.3)
    assert above(seconds, 0.25) == 2
    [message] = caplog.messages
    assert message.startswith("a step held up the event loop, and every request with it, for 0.")
    assert "slow_task (nodeagent/test_loop_lag_real.py:" in message
    assert " > slow (nodeagent/test_loop_lag_real.py:" in message


async def test_a_loop_that_hangs_is_named_while_it_does(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_lag, "HANGS_S", 0.3)
    async with watched():
        await trio.sleep(0.05)
        time.sleep(0.8)  # noqa: ASYNC251
        assert ["the event loop hangs" in message for message in caplog.messages] == [True]
        await trio.sleep(0.1)
    assert len(caplog.messages) == 2


async def test_the_thread_ends_with_the_task() -> None:
    async with watched():
        await trio.sleep(0.05)
        assert "loop watch" in {thread.name for thread in threading.enumerate()}
    with trio.fail_after(2):
        while "loop watch" in {thread.name for thread in threading.enumerate()}:  # noqa: ASYNC110
            await trio.sleep(0.01)


def test_a_process_that_was_suspended_blames_no_step() -> None:
    program = """
import logging, sys, trio
from nodeagent.histogram import Histogram
from nodeagent.loop_lag import BOUNDS_S, LoopLag

async def main():
    seconds = Histogram(BOUNDS_S)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(LoopLag(seconds).run)
        print("runs", flush=True)
        while not seconds.sum >= 0.5:
            await trio.sleep(0.01)
        await trio.sleep(0.5)
        nursery.cancel_scope.cancel()

trio.run(main)
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "runs\n"
        time.sleep(0.3)
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.9)
        os.kill(process.pid, signal.SIGCONT)
        assert process.wait(20) == 0
        assert process.stderr.read() == ""


def in_a_trio_thread(inside: Callable[[], None] | None) -> str | None:
    """What `step_of` says of a thread whose loop runs `inside`, or waits for events."""
    scope = trio.CancelScope()
    tokens: list[trio.lowlevel.TrioToken] = []

    async def main() -> None:
        tokens.append(trio.lowlevel.current_trio_token())
        with scope:
            await trio.lowlevel.checkpoint()
            if inside is not None:
                inside()
            await trio.sleep_forever()

    thread = threading.Thread(target=trio.run, args=(main,))
    thread.start()
    time.sleep(0.2)
    step = step_of(sys._current_frames()[thread.ident or 0])
    tokens[0].run_sync_soon(scope.cancel)
    thread.join(5)
    return step


def test_a_loop_that_waits_for_events_has_no_step() -> None:
    assert in_a_trio_thread(None) is None
    assert step_of(sys._getframe()) is None
    assert step_of(None) is None


def test_a_step_is_named_by_its_task_and_by_what_it_calls() -> None:
    step = in_a_trio_thread(slow)
    assert step is not None
    assert [part.partition(" (")[0].rpartition(".")[2] for part in step.split(" > ")] == ["main", "slow"]
