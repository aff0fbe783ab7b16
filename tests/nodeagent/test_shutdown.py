"""The drain in virtual time; the last resort for real."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from nodeagent.config import NodeConfig, parse_config
from nodeagent.shutdown import drain, exit_after

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


async def test_sigterm_accepts_requests_for_the_grace_period(autojump_clock: MockClock) -> None:
    node = FakeNode()
    now = trio.current_time()
    await drain(node, signal.SIGTERM)
    assert trio.current_time() == now + GRACE_S
    assert node.calls == [("begin_shutdown", now), ("refuse_requests", now + GRACE_S)]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGHUP])
async def test_at_a_terminal_requests_are_refused_at_once(autojump_clock: MockClock, signum: signal.Signals) -> None:
    node = FakeNode()
    now = trio.current_time()
    await drain(node, signum)
    assert node.calls == [("begin_shutdown", now), ("refuse_requests", now)]


async def test_the_drain_is_over_when_the_last_request_has_ended(autojump_clock: MockClock) -> None:
    node = FakeNode(admitted=2)
    now = trio.current_time()

    async def end_requests() -> None:
        for at in (10, 20):
            await trio.sleep_until(now + at)
            node.admitted -= 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(end_requests, name="requests")
        await drain(node, signal.SIGTERM)
        assert trio.current_time() == pytest.approx(now + 20, abs=0.1)


async def test_requests_that_take_too_long_are_cut_off(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    now = trio.current_time()
    await drain(FakeNode(admitted=3), signal.SIGTERM)
    assert trio.current_time() == pytest.approx(now + GRACE_S + TIMEOUT_S)
    assert [record.getMessage() for record in caplog.records] == ["shutdown_timeout_s is over: cutting off 3 requests"]


@pytest.mark.real
@pytest.mark.parametrize(("arguments", "code"), [("0.1", 70), ("0.1, 143", 143)])
def test_the_last_resort_ends_a_process_that_hangs_and_writes_its_log(arguments: str, code: int) -> None:
    program = (
        "from nodeagent import logs; from nodeagent.shutdown import exit_after; import threading; "
        f"logs.configure('human'); exit_after({arguments}); threading.Event().wait(60)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == code
    assert "still not stopped after 0.1 s: exiting now" in ended.stderr


def test_the_last_resort_can_be_called_off() -> None:
    timer = exit_after(3600)
    assert timer.daemon
    timer.cancel()
    timer.join(5)
    assert not timer.is_alive()
