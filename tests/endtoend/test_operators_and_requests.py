"""Operators reach the rest of a server's surface and end requests: the agent as a process and the real llama-server."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fakes.agent_process import AgentProcess, running_agent, seconds_to_idle, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]
ENDLESS: dict[str, Any] = {"model": "slow", "messages": HELLO, "max_tokens": 8000}


@pytest.fixture(scope="module")
def agent(
    llama_server: Path, tiny_model: Path, slow_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentProcess]:
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model)},
        {"model_id": "slow", "path": str(slow_model), "threads": 1},
    ]
    with running_agent(write_config(tmp_path_factory.mktemp("agent"), llama_server, models)) as agent:
        yield agent


@pytest.fixture
def operator(agent: AgentProcess) -> Iterator[httpx.Client]:
    headers = agent.operator_headers()
    with httpx.Client(base_url=agent.base_url, headers=headers, timeout=30, trust_env=False) as http:
        yield http


def running(operator: httpx.Client, wanted: int) -> list[dict[str, Any]]:
    """The requests, once there are so many."""
    for _ in range(1000):  # each look takes milliseconds
        found: list[dict[str, Any]] = operator.get("/v1/node/requests").json()["requests"]
        if len(found) == wanted:
            return found
    raise AssertionError(f"there are still {found}")


def test_any_path_of_a_server_is_reached_and_its_model_is_loaded_for_it(
    agent: AgentProcess, operator: httpx.Client
) -> None:
    assert operator.get("/upstream/tiny/lora-adapters").json() == []
    assert "llamacpp:prompt_tokens_total" in operator.get("/upstream/tiny/metrics").text
    tokens = operator.post("/upstream/tiny:latest/tokenize", json={"content": "hello"})
    assert tokens.json()["tokens"]
    assert tokens.headers["x-node-device"] == "cpu:0"
    assert operator.get("/upstream/tiny/nothing").status_code == 404
    assert operator.post("/upstream/tiny/tools", json={}).json()["error"]["code"] == "path_forbidden"
    [child] = agent.children()
    assert operator.get("/upstream/slow/props").json()["total_slots"] == 1
    assert [it.pid for it in agent.children()] != [child.pid]
    body = {"messages": HELLO, "max_tokens": 2, "stream": True}
    streamed = operator.post("/upstream/tiny/v1/chat/completions", json=body).text
    assert streamed.rstrip().endswith("data: [DONE]")


def test_an_operator_ends_a_stream_and_a_request_behind_it(agent: AgentProcess, operator: httpx.Client) -> None:
    url, lines = f"{agent.base_url}/v1/chat/completions", []
    with (
        ThreadPoolExecutor() as threads,
        httpx.Client(timeout=30, trust_env=False) as http,
        http.stream("POST", url, json=ENDLESS | {"stream": True}) as stream,
    ):
        events = stream.iter_lines()
        lines.append(next(events))
        behind = threads.submit(http.post, url, json=ENDLESS)
        first, second = running(operator, 2)
        assert (first["state"], second["state"]) == ("in_flight", "waiting")
        operator.delete(f"/v1/node/requests/{second['id']}").raise_for_status()
        refused = behind.result(10)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "request_cancelled")
        operator.delete(f"/v1/node/requests/{first['id']}").raise_for_status()
        with pytest.raises(httpx.RemoteProtocolError):
            lines.extend(events)
    [error] = [line for line in lines if "request_cancelled" in line]
    assert json.loads(error.removeprefix("data: "))["error"]["type"] == "server_error"
    running(operator, 0)
    [child] = agent.children()
    assert (seconds_to_idle(child, 5.0) or 0.0) < 2.0


def test_openais_client_does_not_repeat_a_request_that_was_ended(agent: AgentProcess, operator: httpx.Client) -> None:
    with (
        ThreadPoolExecutor() as threads,
        openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key="none", max_retries=2, timeout=30) as client,
    ):
        asked = threads.submit(lambda: client.chat.completions.create(**ENDLESS))
        [request] = running(operator, 1)
        operator.delete(f"/v1/node/requests/{request['id']}").raise_for_status()
        with pytest.raises(openai.InternalServerError, match="An operator of this node ended this request"):
            asked.result(10)
    running(operator, 0)
