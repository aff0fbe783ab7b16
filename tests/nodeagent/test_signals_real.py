"""What signals ask for: real signals to this process, without an agent."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import trio
import trio.testing

from nodeagent import signals as module
from nodeagent.errors import EndedAtOnce
from nodeagent.signals import Signals

CAUGHT = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in CAUGHT}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(params=[True, False], ids=["terminal", "daemon"])
def terminal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(module, "has_terminal", lambda: request.param)
    return bool(request.param)


async def send(*signums: signal.Signals) -> None:
    """Send these signals to this process, and let the event loop see each."""
    for signum in signums:
        os.kill(os.getpid(), signum)
        await trio.testing.wait_all_tasks_blocked(0.01)


async def send_soon(signum: signal.Signals) -> None:
    await trio.testing.wait_all_tasks_blocked()
    await send(signum)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_ends_a_start_in_good_order(signum: signal.Signals) -> None:
    signals = Signals(last_resort_s=60)
    with trio.fail_after(5), signals.caught(), signals.scope:
        await send(signum)
        await trio.sleep_forever()
    assert signals.scope.cancelled_caught


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_the_first_signal_asks_an_agent_that_serves_to_stop_and_cancels_nothing(signum: signal.Signals) -> None:
    signals = Signals(last_resort_s=60)
    with trio.fail_after(5), signals.caught(), signals.scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_soon, signum)
            assert await signals.until_asked() is signum
        await trio.lowlevel.checkpoint()
    assert not signals.scope.cancel_called


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("serves", [True, False], ids=["serving", "starting"])
async def test_a_second_signal_kills_and_ends_at_once_whatever_else_goes_wrong(
    first: signal.Signals, second: signal.Signals, serves: bool, caplog: pytest.LogCaptureFixture
) -> None:
    signals = Signals(last_resort_s=60)
    killed: list[float] = []
    signals.on_kill = lambda: killed.append(trio.current_time())

    async def run() -> None:
        with signals.caught(), signals.scope:
            async with trio.open_nursery() as nursery:
                if serves:
                    nursery.start_soon(signals.until_asked)
                    await trio.testing.wait_all_tasks_blocked(0.01)
                try:
                    with trio.CancelScope(shield=True):
                        await send(first, second, first, second)
                    await trio.sleep_forever()
                finally:
                    raise RuntimeError("on the way out")

    with trio.fail_after(5), pytest.raises(EndedAtOnce) as ended:
        await run()
    assert ended.value.signum == second
    assert len(killed) == 1
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{second.name} again: ending at once"
    ]


async def test_an_error_without_a_second_signal_stays_what_it_is() -> None:
    signals = Signals(last_resort_s=60)
    with pytest.raises(RuntimeError, match="a bug"), signals.caught(), signals.scope:
        raise RuntimeError("a bug")


async def test_a_hang_up_reloads_a_daemon_and_asks_an_agent_at_a_terminal_to_stop(terminal: bool) -> None:
    signals = Signals(last_resort_s=60)
    reloads: list[None] = []
    signals.on_reload = lambda: reloads.append(None)
    asked: list[signal.Signals] = []

    async def wait() -> None:
        asked.append(await signals.until_asked())

    with trio.fail_after(5), signals.caught(), signals.scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            await send(signal.SIGHUP, signal.SIGHUP)
            nursery.cancel_scope.cancel()
    assert (asked, len(reloads)) == (([signal.SIGHUP], 0) if terminal else ([], 2))
    assert not signals.scope.cancel_called


@pytest.mark.parametrize("signum", [signal.SIGUSR1, signal.SIGUSR2])
async def test_a_signal_without_meaning_is_a_line_in_the_log(
    signum: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    signals = Signals(last_resort_s=60)
    with trio.fail_after(5), signals.caught(), signals.scope:
        await send(signum)
    assert caplog.messages == [f"{signum.name}: ignored"]


async def test_afterwards_the_process_can_return_its_exit_code_undisturbed() -> None:
    signals = Signals(last_resort_s=60)
    with signals.caught():
        pass
    await send(*CAUGHT)


def test_a_start_that_does_not_obey_ends_with_the_process() -> None:
    program = """
import os, signal, threading, trio
from nodeagent.signals import Signals

async def main():
    signals = Signals(last_resort_s=0.2)
    with signals.caught(), signals.scope:
        os.kill(os.getpid(), signal.SIGTERM)
        await trio.to_thread.run_sync(threading.Event().wait, 60)

trio.run(main)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stderr) == (70, "still not stopped after 0.2 s: exiting now\n")
