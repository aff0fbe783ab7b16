"""API keys as clients and operators see them: the agent as a process, the real llama-server, official clients."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

SECRET = "the-secret-key-of-carol"
HELLO: Any = [{"role": "user", "content": "hello there"}]


def keys(config: Path, *argv: str) -> str:
    """What `keys` prints with these arguments."""
    command = [sys.executable, "-m", "nodeagent", "keys", *argv, "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


@pytest.fixture(scope="module")
def config(
    llama_server: Path, tiny_model: Path, embedder_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    models = [{"model_id": "chat", "path": str(tiny_model)}, {"model_id": "embed", "path": str(embedder_model)}]
    api_keys = [{"name": "carol", "env": "CAROLS_KEY", "roles": ["metrics"]}]
    folder = tmp_path_factory.mktemp("agent")
    return write_config(folder, llama_server, models, api_keys=api_keys, max_models_per_device=2)


@pytest.fixture(scope="module")
def alices_key(config: Path) -> str:
    return keys(config, "add", "alice", "--model", "chat", "--model", "embed")


@pytest.fixture(scope="module")
def agent(config: Path, alices_key: str) -> Iterator[AgentProcess]:
    with running_agent(config, CAROLS_KEY=SECRET) as agent:
        yield agent


def get(agent: AgentProcess, path: str, key: str | None = None) -> httpx.Response:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return httpx.get(agent.base_url + path, headers=headers, trust_env=False, timeout=30)


def used(agent: AgentProcess, name: str) -> dict[str, int]:
    answer = httpx.get(f"{agent.base_url}/v1/node/keys", headers=agent.operator_headers(), trust_env=False)
    found: dict[str, int] = next(key for key in answer.json()["keys"] if key["name"] == name)["used"]
    return found


def test_the_clients_of_openai_and_anthropic_get_in_by_their_keys_and_their_tokens_are_counted(
    agent: AgentProcess, alices_key: str
) -> None:
    before = used(agent, "alice")
    with openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key=alices_key) as client:
        whole = client.chat.completions.create(model="chat", messages=HELLO, max_tokens=4)
        for _event in client.chat.completions.create(model="chat", messages=HELLO, max_tokens=4, stream=True):
            pass
        embedded = client.embeddings.create(model="embed", input=["one", "two words"])
        assert [model.id for model in client.models.list()] == ["chat", "embed"]
    with anthropic.Anthropic(base_url=agent.base_url, api_key=alices_key) as claude:
        message = claude.messages.create(model="chat", messages=HELLO, max_tokens=4)
    assert whole.usage is not None
    prompt = 2 * whole.usage.prompt_tokens + embedded.usage.prompt_tokens
    prompt += message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0)
    generated = 2 * whole.usage.completion_tokens + message.usage.output_tokens
    after = used(agent, "alice")
    assert after["requests"] - before["requests"] == 4
    assert after["prompt_tokens"] - before["prompt_tokens"] == prompt
    # A stream may end some tokens sooner or later than the answer that is not one.
    assert abs(after["generated_tokens"] - before["generated_tokens"] - generated) <= 4
    assert after["tokens_of_day"] >= prompt


def test_the_activity_tells_who_asked_for_what_and_what_it_took(
    agent: AgentProcess, config: Path, alices_key: str
) -> None:
    with openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key=alices_key, max_retries=0) as client:
        client.chat.completions.create(model="chat", messages=HELLO, max_tokens=4)
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="missing", messages=HELLO)
    answer = httpx.get(
        f"{agent.base_url}/v1/node/activity?key=alice&limit=2", headers=agent.operator_headers(), trust_env=False
    )
    refused, served = answer.json()["activity"]
    assert (refused["status"], refused["error"], refused["model_id"]) == (404, "model_not_found", None)
    assert (served["status"], served["model_id"], served["device_id"]) == (200, "chat", "cpu:0")
    assert served["completion_tokens"] <= 4
    assert served["tokens_per_s"] > 0
    assert served["duration_ms"] >= served["first_token_ms"] > 0
    assert served["user_agent"].startswith("OpenAI/Python")
    argv = [sys.executable, "-m", "nodeagent", "activity", "--limit", "1", "--json", "--config", str(config)]
    shown = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=True).stdout
    assert json.loads(shown)["error"] == "model_not_found"


def test_without_a_valid_key_the_clients_get_their_own_authentication_error(agent: AgentProcess) -> None:
    with (
        openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key="wrong") as client,
        pytest.raises(openai.AuthenticationError, match="is not valid on this node"),
    ):
        client.chat.completions.create(model="chat", messages=HELLO)
    with (
        anthropic.Anthropic(base_url=agent.base_url, api_key="wrong") as claude,
        pytest.raises(anthropic.AuthenticationError),
    ):
        claude.messages.create(model="chat", messages=HELLO, max_tokens=4)
    assert get(agent, "/v1/models").status_code == 401
    assert get(agent, "/readyz").status_code == 200


def test_a_key_is_for_its_role(agent: AgentProcess, alices_key: str) -> None:
    assert get(agent, "/metrics", SECRET).status_code == 200
    assert get(agent, "/v1/node/inventory", SECRET).status_code == 200
    assert get(agent, "/v1/models", SECRET).status_code == 403
    assert get(agent, "/metrics", alices_key).status_code == 403
    assert get(agent, "/v1/node/events?follow=false", alices_key).status_code == 403


def test_a_key_that_is_made_or_removed_while_the_agent_runs_counts_soon(agent: AgentProcess, config: Path) -> None:
    key = keys(config, "add", "dave", "--requests-per-minute", "1")
    until = time.monotonic() + 10
    while get(agent, "/v1/models", key).status_code == 401:
        assert time.monotonic() < until
        time.sleep(0.1)
    with openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key=key, max_retries=0) as client:
        client.chat.completions.create(model="chat", messages=HELLO, max_tokens=1)
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model="chat", messages=HELLO, max_tokens=1)
    assert 1 <= int(refused.value.response.headers["retry-after"]) <= 60
    keys(config, "remove", "dave")
    until = time.monotonic() + 10
    while get(agent, "/v1/models", key).status_code == 200:
        assert time.monotonic() < until
        time.sleep(0.1)
    assert get(agent, "/v1/models", key).status_code == 401


def test_no_secret_is_in_logs_inventory_or_the_servers_surroundings(agent: AgentProcess, alices_key: str) -> None:
    with openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key=alices_key) as client:
        client.chat.completions.create(model="chat", messages=HELLO, max_tokens=1)
    admin = agent.operator_headers()
    shown = [json.dumps(agent.lines)]
    for path in ("/v1/node/inventory", "/v1/node/events?follow=false", "/v1/node/keys", "/v1/node/devices/cpu:0/logs"):
        shown.append(httpx.get(agent.base_url + path, headers=admin, trust_env=False).text)
    children = agent.children()
    assert children
    for child in children:
        shown += child.cmdline()
        shown += [f"{name}={value}" for name, value in child.environ().items()]
    for secret in (SECRET, alices_key, admin["Authorization"].removeprefix("Bearer ")):
        assert not [text for text in shown if secret in text]


def test_an_agent_that_others_can_reach_does_not_start_without_a_key(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    models = [{"model_id": "chat", "path": str(tiny_model)}]
    config = write_config(tmp_path, llama_server, models, listen_host="0.0.0.0")
    for command in ((), ("check-config",)):
        argv = [sys.executable, "-m", "nodeagent", *command, "--config", str(config)]
        ended = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert ended.returncode == 78
        assert "listen_host: others can reach 0.0.0.0, and there is no API key" in ended.stderr
        assert f"keys add NAME --config {config}" in ended.stderr
    keys(config, "add", "alice")
    argv = [sys.executable, "-m", "nodeagent", "check-config", "--config", str(config)]
    assert subprocess.run(argv, capture_output=True, timeout=60, check=False).returncode == 0
