"""Starting and stopping: exit codes, signals, a dispatcher that comes and goes."""

import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.agent_process import AgentProcess, assert_gone, running_agent, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]
LONG = {"model": "slow", "messages": HELLO, "max_tokens": 400, "stream": True}
ENDLESS = {**LONG, "max_tokens": 100_000}


@pytest.fixture
def slow(slow_model: Path) -> list[dict[str, Any]]:
    return [{"model_id": "slow", "path": str(slow_model), "threads": 1}]


def stream(agent: AgentProcess, body: dict[str, Any], begun: threading.Event) -> str:
    with httpx.stream(
        "POST", f"{agent.base_url}/v1/chat/completions", json=body, timeout=60, trust_env=False
    ) as answer:
        text = ""
        for piece in answer.iter_text():
            begun.set()
            text += piece
        return text


def run_to_end(config: Path) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "nodeagent", "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    return ended.returncode, ended.stderr


def test_sigterm_lets_requests_in_flight_end_and_refuses_new_ones(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = write_config(tmp_path, llama_server, slow, drain_grace_s=0.5)
    with (
        running_agent(config) as agent,
        ThreadPoolExecutor(1) as pool,
        httpx.Client(base_url=agent.base_url, trust_env=False) as http,
    ):
        begun = threading.Event()
        text = pool.submit(stream, agent, LONG, begun)
        assert begun.wait(30)
        children = agent.children()
        agent.signal(signal.SIGTERM)
        agent.wait_for_line(lambda line: "draining" in line["message"])
        ready = http.get("/readyz")
        assert (ready.status_code, ready.json()["status"]) == (503, "draining")
        assert http.get("/readyz?drain=404").status_code == 404
        time.sleep(0.6)
        refused = http.post("/v1/chat/completions", json={**LONG, "max_tokens": 1})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "draining"
        assert int(refused.headers["retry-after"]) >= 1
        assert text.result().rstrip().endswith("data: [DONE]")
        assert agent.wait_exit() == 0
        assert_gone(children)


def test_requests_are_still_taken_during_the_drain_grace(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path
) -> None:
    with running_agent(write_config(tmp_path, llama_server, slow, drain_grace_s=3)) as agent:
        agent.signal(signal.SIGTERM)
        agent.wait_for_line(lambda line: "draining" in line["message"])
        answer = httpx.post(
            f"{agent.base_url}/v1/chat/completions", json={**LONG, "max_tokens": 1}, timeout=30, trust_env=False
        )
        assert answer.status_code == 200
        assert agent.wait_exit() == 0


def test_requests_that_outlast_the_shutdown_timeout_are_cut_uncleanly(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path
) -> None:
    with running_agent(write_config(tmp_path, llama_server, slow, shutdown_timeout_s=0.5)) as agent:
        with ThreadPoolExecutor(1) as pool:
            begun = threading.Event()
            text = pool.submit(stream, agent, ENDLESS, begun)
            assert begun.wait(30)
            children = agent.children()
            agent.signal(signal.SIGTERM)
            with pytest.raises(httpx.TransportError):
                text.result()
        assert agent.wait_exit() == 0
        assert_gone(children)


def test_an_idle_keep_alive_client_does_not_hold_up_the_end(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path
) -> None:
    with running_agent(write_config(tmp_path, llama_server, slow)) as agent, httpx.Client(trust_env=False) as http:
        assert http.get(f"{agent.base_url}/livez").status_code == 200
        began = time.monotonic()
        agent.signal(signal.SIGINT)
        assert agent.wait_exit() == 0
        assert time.monotonic() - began < 3


def test_a_bad_configuration_ends_with_78_and_a_line_for_each_fault(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path
) -> None:
    code, stderr = run_to_end(write_config(tmp_path, llama_server, slow, listen_prot=1, queue_timeout_s="soon"))
    assert code == 78
    assert len(stderr.strip().splitlines()) == 2, stderr
    assert "listen_prot" in stderr
    assert "queue_timeout_s" in stderr
    assert "node_agent.yaml:" in stderr


def test_a_binary_that_is_not_there_ends_with_78(slow: list[dict[str, Any]], tmp_path: Path) -> None:
    code, stderr = run_to_end(write_config(tmp_path, tmp_path / "no-server", slow))
    assert code == 78
    assert "llama_server_bin" in stderr
    assert len(stderr.strip().splitlines()) == 1, stderr


def test_a_port_that_is_taken_ends_with_one_clear_line(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, stderr = run_to_end(write_config(tmp_path, llama_server, slow, listen_port=port))
    assert code == 1
    assert len(stderr.strip().splitlines()) == 1, stderr
    assert str(port) in stderr


def test_a_second_agent_on_the_same_state_dir_ends_with_one_line(
    llama_server: Path, slow: list[dict[str, Any]], tmp_path: Path
) -> None:
    config = write_config(tmp_path, llama_server, slow)
    with running_agent(config) as agent:
        code, stderr = run_to_end(config)
        assert code == 1
        assert len(stderr.strip().splitlines()) == 1, stderr
        assert str(agent.process.pid) in stderr
        assert httpx.get(f"{agent.base_url}/livez", trust_env=False).status_code == 200
