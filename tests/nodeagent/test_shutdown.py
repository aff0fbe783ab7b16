"""The drain in virtual time; catching signals and the last resort for real."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from nodeagent.config import NodeConfig, parse_config
from nodeagent.shutdown import exit_after, receive_signals, until_drained

GRACE_S, TIMEOUT_S = 5.0, 30.0


class FakeNode:
    """Remembers when it was called; `admitted` requests end only by assignment."""

    def __init__(self, admitted: int = 0) -> None:
        self.admitted = admitted
        self.calls: list[tuple[str, float]] = []
        keys = f"drain_grace_s: {GRACE_S}\nshutdown_timeout_s: {TIMEOUT_S}\n"
        self.config: NodeConfig = parse_config(keys + "models: [{model_id: a, path: a}]", Path("node.yaml"))

    def begin_shutdown(self) -> None:
        self.calls.append(("begin_shutdown", trio.current_time()))

    def refuse_requests(self) -> None:
        self.calls.append(("refuse_requests", trio.current_time()))

    def reload_soon(self) -> None:
        self.calls.append(("reload_soon", trio.current_time()))


async def drained_at(node: FakeNode, *signals: tuple[float, int]) -> float:
    """When the drain was over, with these signals at these times."""
    send, receive = trio.open_memory_channel[int](10)

    async def raise_signals() -> None:
        for at, signum in signals:
            await trio.sleep_until(at)
            send.send_nowait(signum)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(raise_signals, name="signals")
        await until_drained(node, receive)
        over_at = trio.current_time()
        nursery.cancel_scope.cancel()
    return over_at


async def test_sigterm_accepts_requests_for_the_grace_period(autojump_clock: MockClock) -> None:
    node = FakeNode()
    now = trio.current_time()
    assert await drained_at(node, (now + 1, signal.SIGTERM)) == now + 1 + GRACE_S
    assert node.calls == [("begin_shutdown", now + 1), ("refuse_requests", now + 1 + GRACE_S)]


async def test_sigint_refuses_requests_at_once(autojump_clock: MockClock) -> None:
    node = FakeNode()
    now = trio.current_time()
    assert await drained_at(node, (now + 1, signal.SIGINT)) == now + 1
    assert node.calls == [("begin_shutdown", now + 1), ("refuse_requests", now + 1)]


async def test_the_drain_is_over_when_the_last_request_has_ended(autojump_clock: MockClock) -> None:
    node = FakeNode(admitted=2)
    now = trio.current_time()

    async def end_requests() -> None:
        for at in (10, 20):
            await trio.sleep_until(now + at)
            node.admitted -= 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_requests, name="requests")
        assert await drained_at(node, (now, signal.SIGTERM)) == pytest.approx(now + 20, abs=0.1)


async def test_requests_that_take_too_long_are_cut_off(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    now = trio.current_time()
    assert await drained_at(FakeNode(admitted=3), (now, signal.SIGTERM)) == pytest.approx(now + GRACE_S + TIMEOUT_S)
    assert [record.getMessage() for record in caplog.records] == ["shutdown_timeout_s is over: cutting off 3 requests"]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("after_s", [1.0, GRACE_S + 1.0])
async def test_a_second_signal_ends_the_waiting(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, second: signal.Signals, after_s: float
) -> None:
    now = trio.current_time()
    signals = ((now, signal.SIGTERM), (now + after_s, second))
    assert await drained_at(FakeNode(admitted=3), *signals) == now + after_s
    assert [record.getMessage() for record in caplog.records] == [f"{second.name} again: not waiting for 3 requests"]


async def test_sighup_reloads_before_and_during_the_drain_and_ends_nothing(autojump_clock: MockClock) -> None:
    node = FakeNode(admitted=1)
    now = trio.current_time()
    signals = ((now + 1, signal.SIGHUP), (now + 2, signal.SIGTERM), (now + 3, signal.SIGHUP), (now + 4, signal.SIGINT))
    assert await drained_at(node, *signals) == now + 4
    assert node.calls == [("reload_soon", now + 1), ("begin_shutdown", now + 2), ("reload_soon", now + 3)]


@pytest.mark.real
async def test_the_signals_that_the_agent_handles_are_caught() -> None:
    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            signals = await nursery.start(receive_signals, name="signals")
            for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
                os.kill(os.getpid(), signum)
                assert await anext(signals) == signum
            nursery.cancel_scope.cancel()


@pytest.mark.real
def test_the_last_resort_ends_a_process_that_hangs() -> None:
    program = "from nodeagent.shutdown import exit_after; import threading; exit_after(0.1); threading.Event().wait(60)"
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 70
    assert "still not stopped after 0.1 s: exiting now" in ended.stderr


def test_the_last_resort_can_be_called_off() -> None:
    timer = exit_after(3600)
    assert timer.daemon
    timer.cancel()
    timer.join(5)
    assert not timer.is_alive()
