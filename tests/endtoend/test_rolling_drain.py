"""Two nodes behind a real HAProxy are drained in turn, under steady load: no request is lost."""

import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config
from fakes.waiting import wait_until

BODY: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 2}
EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "haproxy" / "haproxy.cfg"
# More than HAProxy needs to notice: two checks, one second apart.
GRACE_S = 4.0
# After this a drained node refuses for sure, also on a busy machine.
PAST_GRACE_S = GRACE_S + 10.0


@dataclass(frozen=True, slots=True)
class Answer:
    at: float
    status: int
    node: str


class SteadyLoad:
    """Threads that send one request after the other, each on a connection of its own; `answers` are all that came."""

    def __init__(self, url: str, workers: int = 3) -> None:
        self.answers: list[Answer] = []
        self._url = url
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._ask, daemon=True) for _ in range(workers)]

    def __enter__(self) -> "SteadyLoad":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(30)

    def wait_until_served_by(self, *nodes: str, within_s: float = 20.0) -> None:
        """Wait until each of these nodes has answered a request that was sent after now."""
        began = time.monotonic()
        while not {answer.node for answer in self.answers if answer.at >= began} >= set(nodes):
            assert time.monotonic() - began < within_s, self.answers[-10:]
            time.sleep(0.02)

    def _ask(self) -> None:
        while not self._over.wait(0.1):
            at = time.monotonic()
            try:
                answer = httpx.post(self._url, json=BODY, timeout=20, trust_env=False)
                self.answers.append(Answer(at, answer.status_code, answer.headers.get("x-node-id", "-")))
            except httpx.HTTPError as error:
                self.answers.append(Answer(at, 0, repr(error)))


@contextmanager
def haproxy(folder: Path, nodes: dict[str, AgentProcess]) -> Iterator[str]:
    """The example's configuration with these nodes, and without its retries, which would hide a loss."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    text = EXAMPLE.read_text(encoding="utf-8")
    text = re.sub(r"^ *(retries|retry-on|option redispatch).*\n", "", text, flags=re.MULTILINE)
    text = text.replace(":8080", f":{port}")
    for name, old, agent in zip("ab", (8081, 8082), nodes.values(), strict=True):
        assert f"box-{name} 127.0.0.1:{old} agent-port {old + 10}" in text
        text = text.replace(f"127.0.0.1:{old}", agent.base_url.removeprefix("http://"))
        text = text.replace(f"agent-port {old + 10}", f"agent-port {agent_check_port(agent)}")
    file = folder / "haproxy.cfg"
    file.write_text(text, encoding="utf-8")
    program = shutil.which("haproxy", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert program is not None, "haproxy is missing: install its package"
    with subprocess.Popen([program, "-db", "-f", str(file)], stderr=subprocess.DEVNULL) as process:
        try:
            wait_until_it_accepts(port)
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            process.kill()


def agent_check_port(agent: AgentProcess) -> int:
    """Port 1, where nobody answers, if the agent has none."""
    lines = [line["message"] for line in agent.lines if "agent check is answered at port" in line["message"]]
    return int(lines[0].rpartition(" ")[2]) if lines else 1


def wait_until_it_accepts(port: int, within_s: float = 10.0) -> None:
    began = time.monotonic()
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except ConnectionRefusedError:
            assert time.monotonic() - began < within_s, "HAProxy does not listen"
            time.sleep(0.02)


def order(config: Path, name: str) -> None:
    command = [sys.executable, "-m", "nodeagent", name, "--config", str(config)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=60)


def drain_and_undrain(config: Path, agent: AgentProcess) -> None:
    order(config, "drain")
    assert httpx.get(f"{agent.base_url}/readyz", trust_env=False).status_code == 503
    assert ask(agent).status_code == 200
    wait_until(lambda: ask(agent).status_code == 503, PAST_GRACE_S)
    assert ask(agent).json()["error"]["code"] == "draining"
    order(config, "undrain")


def ask(agent: AgentProcess) -> httpx.Response:
    url = f"{agent.base_url}/v1/chat/completions"
    return httpx.post(url, json=BODY, timeout=20, trust_env=False)


@pytest.mark.parametrize("agent_check", [False, True], ids=["without agent check", "with agent check"])
def test_no_request_is_lost_while_an_operator_drains_one_node_after_the_other(
    llama_server: Path, tiny_model: Path, tmp_path: Path, agent_check: bool
) -> None:
    models = [{"model_id": "tiny", "path": str(tiny_model), "preload": True, "threads": 1}]
    keys: dict[str, Any] = {"drain_grace_s": GRACE_S, "max_pending_requests_per_device": 16}
    keys |= {"agent_check_port": 0} if agent_check else {}
    configs = {name: write_config(tmp_path / name, llama_server, models, node_id=name, **keys) for name in ("a", "b")}
    with (
        running_agent(configs["a"]) as a,
        running_agent(configs["b"]) as b,
        haproxy(tmp_path, {"a": a, "b": b}) as url,
        SteadyLoad(url) as load,
    ):
        load.wait_until_served_by("a", "b")
        for name, agent in (("a", a), ("b", b)):
            drain_and_undrain(configs[name], agent)
            load.wait_until_served_by("a", "b")
    assert [answer for answer in load.answers if answer.status != 200] == []
    assert len(load.answers) > 100
