"""The agent as its users run it: `python -m nodeagent --config FILE`, a process of its own."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

Line = dict[str, Any]


class AgentProcess:
    """A running agent, as a daemon: without a terminal. `env` adds to its environment.

    `lines` are its log so far, each a JSON object; a thread appends to it.
    """

    def __init__(self, config: Path, **env: str) -> None:
        self.lines: list[Line] = []
        self._config = config
        self._fresh: queue.SimpleQueue[Line | None] = queue.SimpleQueue()
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "nodeagent",
                "--config",
                str(config),
                "--log-format",
                "json",
                "--log-level",
                "debug",
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={**os.environ, **env},
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.base_url = ""

    def operator_headers(self) -> dict[str, str]:
        """What authenticates an operator."""
        state_dir = Path(json.loads(self._config.read_text())["state_dir"])
        return {"Authorization": f"Bearer {(state_dir / 'admin.token').read_text().strip()}"}

    def wait_ready(self, timeout_s: float = 30.0) -> "AgentProcess":
        line = self.wait_for_line(lambda line: " accepts requests at " in line["message"], timeout_s)
        self.base_url = str(line["message"]).rpartition(" ")[2]
        return self

    def wait_for_line(self, wanted: Callable[[Line], bool], timeout_s: float = 30.0) -> Line:
        """The first line, of those not yet waited for, that is wanted."""
        until = time.monotonic() + timeout_s
        while True:
            try:
                line = self._fresh.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no such line within {timeout_s} s; the log ends: {self._tail()}") from None
            assert line is not None, f"the agent ended with {self.process.wait()}; its log ends: {self._tail()}"
            if wanted(line):
                return line

    def forget_lines(self) -> None:
        """What has been logged so far is waited for no more."""
        with suppress(queue.Empty):
            while True:
                self._fresh.get_nowait()

    def children(self) -> list[psutil.Process]:
        """The llama-servers that run under the agent; none once it has ended."""
        if self.process.poll() is not None:
            return []
        return [
            child
            for child in psutil.Process(self.process.pid).children(recursive=True)
            if child.status() != psutil.STATUS_ZOMBIE
        ]

    def wait_child(self, timeout_s: float = 10.0, *, not_pid: int | None = None) -> psutil.Process:
        """The one llama-server, once there is one (another one than `not_pid`)."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            children = [child for child in self.children() if child.pid != not_pid]
            if children:
                return children[0]
            time.sleep(0.01)
        raise AssertionError(f"no child within {timeout_s} s; the log ends: {self._tail()}")

    def signal(self, signum: signal.Signals) -> None:
        self.process.send_signal(signum)

    def wait_exit(self, timeout_s: float = 30.0) -> int:
        code = self.process.wait(timeout_s)
        self._reader.join(5.0)
        return code

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as stderr:
            for raw in stderr:
                try:
                    line = json.loads(raw)
                except ValueError:
                    line = {"message": raw.decode(errors="replace").rstrip()}
                self.lines.append(line)
                self._fresh.put(line)
        self._fresh.put(None)

    def _tail(self) -> str:
        return "\n".join(json.dumps(line) for line in self.lines[-15:])


def write_config(folder: Path, llama_server: Path, models: list[dict[str, Any]], **keys: Any) -> Path:
    """A configuration for a node of its own in this folder; JSON is YAML.

    A model has one thread, if it does not say how many: several wait for each other, busily, which takes long on a busy
    machine.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "listen_port": 0,
        "node_id": "test-node",
        "state_dir": str(folder / "state"),
        "llama_server_bin": str(llama_server),
        "backend": "cpu",
        "drain_grace_s": 0,
        "models": [{"threads": 1, **model} for model in models],
        **keys,
    }
    path = folder / "node_agent.yaml"
    path.write_text(json.dumps(config, indent=1))
    return path


@contextmanager
def running_agent(config: Path, **env: str) -> Iterator[AgentProcess]:
    """A ready agent; afterwards it is stopped, and must have ended well and left no child."""
    agent = AgentProcess(config, **env)
    try:
        agent.wait_ready()
        yield agent
        children = agent.children()
        if agent.process.poll() is None:
            agent.signal(signal.SIGINT)
            assert agent.wait_exit() == 0, agent._tail()
        assert_gone(children)
    finally:
        if agent.process.poll() is None:
            os.kill(agent.process.pid, signal.SIGKILL)
            agent.wait_exit()


def assert_gone(processes: list[psutil.Process], within_s: float = 1.0) -> None:
    """All of them have ended, if not been reaped: whose child an orphan becomes is not ours to say."""
    until = time.monotonic() + within_s
    while alive := [process for process in processes if not has_ended(process)]:
        assert time.monotonic() < until, f"still there after {within_s} s: {alive}"
        time.sleep(0.005)


def has_ended(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def seconds_to_idle(child: psutil.Process, within_s: float) -> float | None:
    """How long until this llama-server generates nothing any more, None if not `within_s`.

    Read from the CPU time that it uses, not from `/slots`: asking that often would itself keep a request that was
    left from being noticed.
    """
    began = time.monotonic()
    busy = _cpu_s(child)
    while time.monotonic() - began < within_s + 0.2:
        time.sleep(0.1)
        now = _cpu_s(child)
        if now - busy < 0.02:
            return time.monotonic() - began - 0.1
        busy = now
    return None


def _cpu_s(child: psutil.Process) -> float:
    times = child.cpu_times()
    return float(times.user + times.system)
