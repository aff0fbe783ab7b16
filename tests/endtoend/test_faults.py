"""What goes wrong on a host, done to the agent as a process: killed children, bad models, a killed agent."""

import dataclasses
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from fakes.agent_process import AgentProcess, assert_gone, running_agent, write_config
from fakes.tiny_models import TINY, write_model

HELLO: Any = [{"role": "user", "content": "hello there"}]


def openai_client(agent: AgentProcess) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key="none", max_retries=0, timeout=30)


def post(agent: AgentProcess, model: str, tokens: int = 4, timeout_s: float = 30) -> httpx.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": tokens}
    return httpx.post(f"{agent.base_url}/v1/chat/completions", json=body, timeout=timeout_s, trust_env=False)


@pytest.fixture
def one_slow_model(llama_server: Path, slow_model: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, llama_server, [{"model_id": "slow", "path": str(slow_model), "threads": 1}])


def test_a_stream_whose_server_is_killed_ends_in_an_error_event_and_never_cleanly(one_slow_model: Path) -> None:
    with running_agent(one_slow_model) as agent:
        with openai_client(agent) as client:
            stream = client.chat.completions.create(model="slow", messages=HELLO, max_tokens=5000, stream=True)
            next(stream)
            agent.wait_child().kill()
            with pytest.raises(openai.APIError, match="slow"):
                for _chunk in stream:
                    pass
        body = {"model": "slow", "messages": HELLO, "max_tokens": 5000, "stream": True}
        with httpx.stream(
            "POST", f"{agent.base_url}/v1/chat/completions", json=body, timeout=30, trust_env=False
        ) as answer:
            pieces = answer.iter_bytes()
            text = next(pieces)
            rest: list[bytes] = []
            agent.wait_child().kill()
            with pytest.raises(httpx.RemoteProtocolError):
                rest.extend(pieces)  # keeps what came before the error
            text += b"".join(rest)
        last_event = text.decode().split("\n\n")[-2]
        assert last_event.startswith('data: {"error":')
        assert "backend_crashed" in last_event
        assert "[DONE]" not in text.decode()
        assert post(agent, "slow").status_code == 200


def test_a_request_whose_server_is_killed_before_its_answer_is_served_by_the_next(one_slow_model: Path) -> None:
    with running_agent(one_slow_model) as agent:
        post(agent, "slow", 1)
        child = agent.wait_child()
        killer = threading.Timer(0.3, child.kill)
        killer.start()
        answer = post(agent, "slow", 300)
        assert not child.is_running()
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 300


def test_a_request_that_two_servers_died_under_is_a_bad_gateway_that_says_not_to_retry(one_slow_model: Path) -> None:
    with running_agent(one_slow_model) as agent:
        post(agent, "slow", 1)
        first = agent.wait_child()

        def kill_two() -> None:
            first.kill()
            second = agent.wait_child(not_pid=first.pid)
            agent.wait_for_line(lambda line: "is ready at" in line["message"] and line["generation"] == 2)
            while second.cpu_times().user < 0.3:  # until it is at work on the request
                pass
            second.kill()

        killer = threading.Timer(0.3, kill_two)
        killer.start()
        answer = post(agent, "slow", 5000, timeout_s=60)
        killer.join()
        assert answer.status_code == 502
        assert answer.json()["error"]["code"] == "backend_crashed"
        assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize("port", ["{spy}", "99999999999999999999"])
def test_a_model_file_can_not_say_where_its_server_listens(port: str, llama_server: Path, tmp_path: Path) -> None:
    """At this verbosity the server prints the name in the file, before it says where it listens."""
    with socket.create_server(("127.0.0.1", 0)) as spy:
        spy.setblocking(False)
        told = "listening on http://127.0.0.1:" + port.format(spy=spy.getsockname()[1])
        path = write_model(dataclasses.replace(TINY, name="hostile", title=told), tmp_path)
        model = {"model_id": "hostile", "path": str(path), "server_args": {"verbosity": 4}}
        with running_agent(write_config(tmp_path, llama_server, [model])) as agent:
            assert post(agent, "hostile").status_code == 200
            assert any(line["message"].endswith(told) for line in agent.lines), "the server has printed it"
        with pytest.raises(BlockingIOError):
            spy.accept()


@pytest.mark.parametrize("verbosity", [0, 1])
def test_a_server_that_does_not_say_where_it_listens_is_found(
    verbosity: int, llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    model = {"model_id": "quiet", "path": str(tiny_model), "server_args": {"verbosity": verbosity}}
    with running_agent(write_config(tmp_path, llama_server, [model])) as agent:
        assert post(agent, "quiet").status_code == 200
        assert not any("listening on" in line["message"] for line in agent.lines)


def test_no_child_outlives_a_killed_agent(one_slow_model: Path) -> None:
    with running_agent(one_slow_model) as agent:
        post(agent, "slow", 1)
        children = agent.children()
        assert children
        agent.signal(signal.SIGKILL)
        agent.wait_exit()
        assert_gone(children)


def test_a_model_file_that_is_missing_fails_that_model_alone_and_is_looked_at_again(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    late = tmp_path / "late.gguf"
    models = [{"model_id": "late", "path": str(late)}, {"model_id": "tiny", "path": str(tiny_model)}]
    with running_agent(write_config(tmp_path, llama_server, models)) as agent:
        assert any("late" in line["message"] and line["level"] == "warning" for line in agent.lines)
        answer = post(agent, "late")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "backend_unavailable"
        assert "late.gguf" in answer.json()["error"]["message"]
        assert post(agent, "tiny").status_code == 200
        ready = httpx.get(f"{agent.base_url}/readyz", trust_env=False)
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert "late" in ready.json()["reasons"][0]
        late.write_bytes(tiny_model.read_bytes())
        assert post(agent, "late").status_code == 200
        assert httpx.get(f"{agent.base_url}/readyz", trust_env=False).json()["status"] == "ready"


def test_a_truncated_model_file_is_told_with_the_reason(llama_server: Path, tiny_model: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny_model.read_bytes()[:-5000])
    with running_agent(write_config(tmp_path, llama_server, [{"model_id": "cut", "path": str(cut)}])) as agent:
        answer = post(agent, "cut")
        assert answer.status_code == 503
        assert "truncated" in answer.json()["error"]["message"]
        assert httpx.get(f"{agent.base_url}/readyz", trust_env=False).status_code == 503
        assert httpx.get(f"{agent.base_url}/livez", trust_env=False).status_code == 200


def test_a_server_that_exits_while_starting_is_told_at_once_and_operators_get_its_last_words(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    models = [{"model_id": "tiny", "path": str(tiny_model), "server_args": {"pooling": "no-such-one"}}]
    with running_agent(write_config(tmp_path, llama_server, models)) as agent:
        answer = post(agent, "tiny", timeout_s=15)
        assert answer.status_code == 503
        assert "exited with code 1" in answer.json()["error"]["message"]
        url = f"{agent.base_url}/v1/node/inventory"
        inventory = httpx.get(url, headers=agent.operator_headers(), trust_env=False).json()
        assert "no-such-one" in inventory["devices"][0]["servers"][0]["reason"]
        # The help text that follows the error is not shown.
        agent.wait_for_line(lambda line: "exited with code 1; last words: error" in line["message"])
        assert int(answer.headers["retry-after"]) >= 1


def test_a_model_that_is_too_slow_to_load_is_refused_for_now_and_ready_for_the_retry(
    llama_server: Path, smollm2: Path, tmp_path: Path
) -> None:
    config = write_config(
        tmp_path,
        llama_server,
        [{"model_id": "smollm2", "path": str(smollm2)}],
        llama_server_startup_timeout_s=0.05,
        llama_server_startup_limit_s=30,
    )
    with running_agent(config) as agent:
        answer = post(agent, "smollm2")
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "model_loading"
        assert 1 <= int(answer.headers["retry-after"]) <= 120
        agent.wait_for_line(lambda line: "llama_server_startup_timeout_s" in line["message"])
        agent.wait_for_line(lambda line: "cpu:0/smollm2 is ready at" in line["message"])
        [child] = agent.children()
        assert post(agent, "smollm2").status_code == 200
        assert [child] == agent.children(), "the start was begun anew"


def test_a_real_model_gives_sensible_text(llama_server: Path, smollm2: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path, llama_server, [{"model_id": "smollm2", "path": str(smollm2), "preload": True}])
    with running_agent(config) as agent, openai_client(agent) as client:
        answer = client.chat.completions.create(
            model="smollm2",
            messages=[{"role": "user", "content": "What is the sun? Answer in one sentence."}],
            max_tokens=48,
            temperature=0,
        )
        text = (answer.choices[0].message.content or "").lower()
        # Not one word alone: processors round differently, and so may the model's choice of words.
        assert any(word in text for word in ("light", "star", "heat", "energy", "solar")), text


def test_a_child_that_dies_idle_is_started_again_without_being_asked_for(one_slow_model: Path) -> None:
    with running_agent(one_slow_model) as agent:
        post(agent, "slow", 1)
        child = agent.wait_child()
        child.kill()
        assert psutil.pid_exists(agent.wait_child(not_pid=child.pid).pid)
        assert post(agent, "slow", 1).status_code == 200
