"""The agent under a service manager: a real socket, as systemd has it."""

import itertools
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

WATCHDOG_S = 1.0


class Manager:
    """Receives what the agent sends to `address`; `messages` are all so far, with the times of their arrival."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self.messages: list[tuple[float, str]] = []
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(self.address)

    def wait_for(self, wanted: Callable[[str], bool], within_s: float = 10.0) -> float:
        """Wait for the next message that is wanted; return when it came."""
        until = time.monotonic() + within_s
        while True:
            self.socket.settimeout(max(0.001, until - time.monotonic()))
            message = self.socket.recv(4096).decode()
            self.messages.append((time.monotonic(), message))
            if wanted(message):
                return self.messages[-1][0]

    def wait_for_feed(self) -> float:
        return self.wait_for("WATCHDOG=1".__eq__)

    def is_silent_for(self, seconds: float) -> bool:
        self.socket.settimeout(seconds)
        try:
            self.socket.recv(4096)
        except TimeoutError:
            return True
        return False


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(tmp_path)
    with manager.socket:
        yield manager


@pytest.fixture
def agent(manager: Manager, llama_server: Path, tiny_model: Path, tmp_path: Path) -> Iterator[AgentProcess]:
    models = [{"model_id": "tiny", "path": str(tiny_model)}]
    config = write_config(tmp_path / "agent", llama_server, models)
    variables = {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": f"{WATCHDOG_S * 1e6:.0f}"}
    with running_agent(config, **variables) as agent:
        yield agent


def test_it_tells_of_its_start_its_reload_and_its_stop(agent: AgentProcess, manager: Manager) -> None:
    manager.wait_for("READY=1".__eq__)
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    assert httpx.post(f"{agent.base_url}/v1/completions", json=body, timeout=60, trust_env=False).status_code == 200
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC"} & psutil.Process(agent.wait_child().pid).environ().keys()
    manager.wait_for("STATUS=ready: 0 requests in flight, 0 queued; loaded: tiny on cpu:0".__eq__)
    before = time.monotonic_ns() // 1000
    agent.signal(signal.SIGHUP)
    manager.wait_for(lambda it: it.startswith("RELOADING=1\n"))
    assert int(manager.messages[-1][1].rpartition("=")[2]) > before
    manager.wait_for("READY=1".__eq__)
    agent.wait_for_line(lambda line: line["message"].startswith("configuration reloaded"))
    agent.signal(signal.SIGTERM)
    manager.wait_for("STOPPING=1".__eq__)
    manager.wait_for(lambda it: it.startswith("EXTEND_TIMEOUT_USEC="))
    assert agent.wait_exit() == 0


def test_the_watchdog_is_fed_only_while_the_event_loop_turns(agent: AgentProcess, manager: Manager) -> None:
    fed_at = [manager.wait_for_feed() for _ in range(4)]
    assert max(later - sooner for sooner, later in itertools.pairwise(fed_at)) < WATCHDOG_S
    agent.signal(signal.SIGSTOP)
    try:
        while not manager.is_silent_for(WATCHDOG_S):
            assert agent.process.poll() is None
    finally:
        agent.signal(signal.SIGCONT)
    manager.wait_for_feed()
