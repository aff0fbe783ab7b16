"""The agent and the example dispatcher, two processes."""

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from fakes.agent_process import running_agent, write_config
from fakes.waiting import wait_until

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "dispatcher.py"
HELLO = [{"role": "user", "content": "hello"}]


@contextmanager
def dispatcher(port: int, *arguments: str) -> Iterator[None]:
    argv = [sys.executable, str(EXAMPLE), "--port", str(port), *arguments]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as running:
        try:
            wait_until(lambda: responds(port))
            yield
        finally:
            running.kill()


def responds(port: int) -> bool:
    try:
        httpx.get(f"http://127.0.0.1:{port}/nodes", timeout=2, trust_env=False)
    except httpx.TransportError:
        return False
    return True


def node_at(port: int) -> dict[str, Any]:
    nodes = httpx.get(f"http://127.0.0.1:{port}/nodes", timeout=5, trust_env=False).json()
    node: dict[str, Any] = nodes.get("test-node", {})
    return node


def metrics(base_url: str) -> dict[str, float]:
    """What the agent tells of its dispatcher."""
    text = httpx.get(f"{base_url}/metrics", timeout=5, trust_env=False).text
    found = re.findall(r"^nodeagent_(dispatcher_up|heartbeat_age_seconds) (\S+)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def test_a_dispatcher_sees_the_node_and_serving_does_not_depend_on_it(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    port = free_port()
    config = write_config(
        tmp_path,
        llama_server,
        [{"model_id": "tiny", "path": str(tiny_model), "roles": ["planner"]}],
        dispatcher_base_url=f"http://127.0.0.1:{port}",
        heartbeat_interval_s=1,
    )
    with running_agent(config) as agent:

        def chat() -> int:
            body = {"model": "tiny", "messages": HELLO, "max_tokens": 2}
            url = f"{agent.base_url}/v1/chat/completions"
            return httpx.post(url, json=body, timeout=30, trust_env=False).status_code

        assert chat() == 200  # no dispatcher yet
        assert metrics(agent.base_url) == {"dispatcher_up": 0.0}
        with dispatcher(port):
            wait_until(lambda: node_at(port).get("status") == "ready")
            assert node_at(port)["devices"] == ["cpu:0"]
            wait_until(lambda: node_at(port)["models"] == {"tiny": ["cpu:0"]})
            agent.wait_child().kill()
            assert chat() == 200
            told = metrics(agent.base_url)
            assert told["dispatcher_up"] == 1
            assert 0 <= told["heartbeat_age_seconds"] < 3
        assert chat() == 200  # the dispatcher was killed
        with dispatcher(port):
            wait_until(lambda: node_at(port).get("status") == "ready")
            assert chat() == 200


def test_a_dispatcher_gets_the_status_of_a_node_that_drains_and_stops(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    port = free_port()
    models = [{"model_id": "tiny", "path": str(tiny_model)}]
    config = write_config(
        tmp_path, llama_server, models, dispatcher_base_url=f"http://127.0.0.1:{port}", drain_grace_s=2
    )
    with dispatcher(port), running_agent(config) as agent:
        wait_until(lambda: node_at(port).get("status") == "ready")
        agent.process.terminate()
        wait_until(lambda: node_at(port)["status"] == "draining", 1.5)
        wait_until(lambda: node_at(port)["status"] == "stopping")
        assert agent.wait_exit() == 0


def test_the_token_is_sent_and_a_wrong_one_is_logged_as_an_error(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    port = free_port()
    node_token, dispatcher_token = tmp_path / "node.token", tmp_path / "dispatcher.token"
    node_token.write_text("right-token\n")
    dispatcher_token.write_text("right-token\n")
    config = write_config(
        tmp_path,
        llama_server,
        [{"model_id": "tiny", "path": str(tiny_model)}],
        dispatcher_base_url=f"http://127.0.0.1:{port}",
        dispatcher_token_file=str(node_token),
    )
    with dispatcher(port, "--token-file", str(dispatcher_token)), running_agent(config) as agent:
        agent.wait_for_line(lambda line: "registered" in line["message"])
    node_token.write_text("wrong-token\n")
    with dispatcher(port, "--token-file", str(dispatcher_token)), running_agent(config) as agent:
        line = agent.wait_for_line(lambda line: "401" in line["message"])
        assert line["level"] == "error"
        assert "wrong-token" not in str(agent.lines)
