"""Signals to the agent as a process: one or more of them in each phase of its life, and to its whole group."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from fakes.agent_process import AgentProcess, assert_gone, running_agent, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]
LONG = {"model": "slow", "messages": HELLO, "max_tokens": 300, "stream": True}
ENDLESS = {**LONG, "max_tokens": 100_000}
AT_ONCE_S = 2.0

# llama-server in a wrapper that takes no notice of SIGTERM: only the SIGKILL at the end of its grace ends it.
DEAF_SERVER = """#!/bin/sh
trap '' TERM
{binary} "$@"
sleep 60
"""
# The driver of a host that takes its time: the agent asks it as it starts. It answers once the file `go` is there, or
# its folder is not any more.
SLOW_SMI = """#!/bin/sh
touch {folder}/asked
while [ -e {folder}/asked ] && ! [ -e {folder}/go ]; do sleep 0.02; done
"""


@pytest.fixture(params=[signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def signum(request: pytest.FixtureRequest) -> signal.Signals:
    assert isinstance(request.param, signal.Signals)
    return request.param


@pytest.fixture
def slow(slow_model: Path) -> list[dict[str, Any]]:
    return [{"model_id": "slow", "path": str(slow_model), "threads": 1}]


@contextmanager
def stream_in_flight(agent: AgentProcess, body: dict[str, Any] = ENDLESS) -> Iterator[list[str]]:
    """What a client has received so far of a stream that has begun."""
    received: list[str] = []
    begun = threading.Event()

    def read() -> None:
        url = f"{agent.base_url}/v1/chat/completions"
        try:
            with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as answer:
                for text in answer.iter_text():
                    received.append(text)
                    begun.set()
        except httpx.TransportError as error:
            received.append(repr(error))

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        assert begun.wait(30)
        yield received
        reading.result(60)


def assert_ends_at_once(agent: AgentProcess, signum: signal.Signals, *, times: int = 1) -> None:
    """One more signal (or more) ends the agent and all below it, and says so in one line."""
    children, before = agent.children(), len(agent.lines)
    began = time.monotonic()
    for _ in range(times):
        agent.signal(signum)
        time.sleep(0.02)
    assert agent.wait_exit(15) == 128 + signum, agent.lines[-5:]
    assert time.monotonic() - began < AT_ONCE_S
    assert_gone(children)
    # Its servers warn of what they cut off.
    own = [line for line in agent.lines[before:] if line.get("logger") != "nodeagent.child"]
    told = [line["message"] for line in own if line.get("level") in ("warning", "error", "critical")]
    assert told == [f"{signum.name} again: ending at once"]
    assert_no_traceback(agent)


def assert_no_traceback(agent: AgentProcess) -> None:
    assert [line for line in agent.lines if "exception" in line or "Traceback" in line["message"]] == []


def wait_until(what: Callable[[], bool]) -> None:
    until = time.monotonic() + 30
    while not what():
        assert time.monotonic() < until
        time.sleep(0.01)


# While it starts.


@contextmanager
def starting_agent(llama_server: Path, models: list[dict[str, Any]], folder: Path) -> Iterator[AgentProcess]:
    """An agent whose driver has not answered yet."""
    smi = folder / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(SLOW_SMI.format(folder=folder))
    smi.chmod(0o755)
    config = write_config(folder, llama_server, models, backend="auto")
    agent = AgentProcess(config, PATH=f"{smi.parent}:{os.environ['PATH']}")
    try:
        wait_until((folder / "asked").exists)
        yield agent
    finally:
        let_driver_answer(folder)
        if agent.process.poll() is None:
            agent.process.kill()
            agent.wait_exit()


def let_driver_answer(folder: Path) -> None:
    """Have the driver of a starting agent answer."""
    (folder / "go").touch()


def test_a_signal_during_the_start_ends_it_in_good_order(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path, signum: signal.Signals
) -> None:
    with starting_agent(llama_server, slow, tmp_path) as agent:
        agent.signal(signum)
        agent.wait_for_line(lambda line: line["message"] == f"{signum.name}: stopping before the start was complete")
        let_driver_answer(tmp_path)
        assert agent.wait_exit() == 0
        assert_no_traceback(agent)


def test_a_second_signal_during_the_start_ends_it_at_once_although_a_driver_holds_it_up(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path, signum: signal.Signals
) -> None:
    with starting_agent(llama_server, slow, tmp_path) as agent:
        agent.signal(signum)
        agent.wait_for_line(lambda line: line["message"] == f"{signum.name}: stopping before the start was complete")
        began = time.monotonic()
        agent.signal(signum)
        assert agent.wait_exit(15) == 128 + signum
        assert time.monotonic() - began < AT_ONCE_S
        assert_no_traceback(agent)


def imports_something(pid: int) -> bool:
    """Whether the process is past the start of the interpreter, which is not ours."""
    return "pydantic_core" in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_signals_at_any_moment_of_the_start_leave_no_traceback_and_no_server(
    llama_server: Path, tiny_model: Path, tmp_path: Path, signum: signal.Signals, count: int
) -> None:
    models = [{"model_id": "tiny", "path": str(tiny_model), "preload": True}]

    def signal_at(step: int) -> None:
        agent = AgentProcess(write_config(tmp_path / str(step), llama_server, models))
        wait_until(lambda: imports_something(agent.process.pid))
        time.sleep(0.15 * step)
        children = agent.children()
        for _ in range(count):
            agent.signal(signum)
            time.sleep(0.03)
        code = agent.wait_exit(15)
        # Before there is anything to stop in good order, the signal ends the process as it ends any.
        assert code in (0, 128 + signum, -signum), (code, agent.lines[-5:])
        assert_gone(children)
        assert_no_traceback(agent)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(signal_at, range(8)))


# While it serves, drains and stops its servers.


def test_a_second_signal_while_it_drains_ends_it_at_once(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path, signum: signal.Signals
) -> None:
    config = write_config(tmp_path, llama_server, slow, drain_grace_s=60, shutdown_timeout_s=60)
    with running_agent(config) as agent, stream_in_flight(agent):
        agent.signal(signum)
        agent.wait_for_line(lambda line: ": draining" in line["message"])
        assert_ends_at_once(agent, signum)


def test_a_third_signal_changes_nothing(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path, signum: signal.Signals
) -> None:
    config = write_config(tmp_path, llama_server, slow, drain_grace_s=60, shutdown_timeout_s=60)
    with running_agent(config) as agent, stream_in_flight(agent):
        agent.signal(signum)
        agent.wait_for_line(lambda line: ": draining" in line["message"])
        assert_ends_at_once(agent, signum, times=3)


def test_a_second_signal_while_its_servers_are_stopped_ends_it_at_once(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path, signum: signal.Signals
) -> None:
    deaf = tmp_path / "deaf-server"
    deaf.write_text(DEAF_SERVER.format(binary=llama_server))
    deaf.chmod(0o755)
    config = write_config(tmp_path, deaf, slow, llama_server_stop_grace_s=30)
    with running_agent(config) as agent:
        url = f"{agent.base_url}/v1/chat/completions"
        assert httpx.post(url, json={**LONG, "max_tokens": 1}, timeout=60, trust_env=False).status_code == 200
        agent.signal(signum)
        agent.wait_for_line(lambda line: ": draining" in line["message"])
        time.sleep(0.5)
        assert agent.process.poll() is None
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{agent.base_url}/livez", trust_env=False)
        assert_ends_at_once(agent, signum)


def test_a_signal_to_the_whole_process_group_lets_the_streams_end(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path, signum: signal.Signals
) -> None:
    """As a shell's Ctrl-C has it: the agent leads a group, and everything that is in it gets the signal."""
    with running_agent(write_config(tmp_path, llama_server, slow)) as agent:
        with stream_in_flight(agent, LONG) as received:
            children = agent.children()
            assert os.getpgid(agent.process.pid) == agent.process.pid
            os.killpg(agent.process.pid, signum)
        assert "".join(received).rstrip().endswith("data: [DONE]")
        assert agent.wait_exit() == 0
        assert_gone(children)


def test_a_server_that_is_killed_while_the_agent_drains_is_not_started_again(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = write_config(tmp_path, llama_server, slow, drain_grace_s=3)
    with running_agent(config) as agent:
        with stream_in_flight(agent) as received:
            agent.signal(signal.SIGTERM)
            agent.wait_for_line(lambda line: ": draining" in line["message"])
            for child in agent.children():  # as systemd's KillMode=control-group does
                child.send_signal(signal.SIGTERM)
        assert "error" in "".join(received)
        agent.wait_for_line(lambda line: "cpu:0/slow is not restarted" in line["message"])
        assert agent.wait_exit() == 0
    assert len([line for line in agent.lines if "cpu:0/slow is starting" in line["message"]]) == 1


@pytest.mark.parametrize("without_meaning", [signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_without_meaning_ends_nothing(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path, without_meaning: signal.Signals
) -> None:
    with running_agent(write_config(tmp_path, llama_server, slow)) as agent:
        agent.signal(without_meaning)
        agent.wait_for_line(lambda line: line["message"] == f"{without_meaning.name}: ignored")
        assert httpx.get(f"{agent.base_url}/livez", trust_env=False).status_code == 200


def test_an_undrain_after_sigterm_says_that_it_can_not(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path
) -> None:
    with running_agent(config := write_config(tmp_path, llama_server, slow, shutdown_timeout_s=60)) as agent:
        with stream_in_flight(agent):  # for which it waits
            agent.signal(signal.SIGTERM)
            agent.wait_for_line(lambda line: ": draining" in line["message"])
            command = [sys.executable, "-m", "nodeagent", "undrain", "--config", str(config)]
            ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
            assert (ended.returncode, ended.stdout) == (1, "")
            why = "This node is shutting down, so it can't accept requests again."
            assert ended.stderr == f"rolemesh-node-agent: {why}\n"
            url = f"{agent.base_url}/v1/node/undrain"
            answer = httpx.post(url, headers=agent.operator_headers(), trust_env=False)
            assert (answer.status_code, answer.json()["error"]["code"]) == (409, "shutting_down")
            agent.wait_child().kill()
        assert agent.wait_exit() == 0


def test_a_second_signal_ends_a_demo_at_once_in_one_line_and_with_its_server(
    smollm2: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    command = [sys.executable, "-m", "nodeagent", "demo", "--port", "0"]
    environment = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    log = tmp_path / "log"
    with (
        log.open("w") as output,
        subprocess.Popen(command, stdout=output, stderr=output, env=environment, start_new_session=True) as demo,
    ):
        wait_until(lambda: "To stop: Ctrl-C." in log.read_text())
        servers = psutil.Process(demo.pid).children(recursive=True)
        assert servers
        for server in servers:  # so that it takes no notice of SIGTERM, and the second signal finds it there
            server.suspend()
        demo.send_signal(signum)
        wait_until(lambda: f"{signum.name}: draining" in log.read_text())
        began = time.monotonic()
        demo.send_signal(signum)
        assert demo.wait(15) == 128 + signum
        assert time.monotonic() - began < AT_ONCE_S
    assert_gone(servers)
    text = log.read_text()
    assert len([line for line in text.splitlines() if line.endswith(f"{signum.name} again: ending at once")]) == 1
    assert "Traceback" not in text
