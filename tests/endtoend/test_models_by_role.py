"""Roles, fallbacks, a model's own parameters and media by URL, against the real llama-server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def agent(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentProcess]:
    folder = tmp_path_factory.mktemp("agent")
    models: list[dict[str, Any]] = [
        {
            "model_id": "chat",
            "path": str(tiny_model),
            "aliases": ["gpt-4o", "gpt-4o-mini"],
            "roles": ["planner"],
            "defaults": {"max_tokens": 3},
            "overrides": {"n_probs": 0, "timings_per_token": False},
        },
        {
            "model_id": "strict",
            "path": str(tiny_model_b),
            "roles": ["planner"],
            "overrides": {"max_tokens": 2},
            "max_request_bytes": 500,
        },
        {"model_id": "gone", "path": str(folder / "missing.gguf"), "fallback": ["chat"]},
    ]
    with running_agent(write_config(folder, llama_server, models, max_models_per_device=2)) as agent:
        yield agent


def chat(agent: AgentProcess, **fields: Any) -> httpx.Response:
    body = {"messages": HELLO, "ignore_eos": True, **fields}
    return httpx.post(f"{agent.base_url}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def tokens(answer: httpx.Response) -> int:
    assert answer.status_code == 200, answer.text
    return int(answer.json()["usage"]["completion_tokens"])


def test_a_default_gives_way_to_the_request_and_an_override_does_not(agent: AgentProcess) -> None:
    assert tokens(chat(agent, model="gpt-4o")) == 3
    assert tokens(chat(agent, model="gpt-4o-mini", max_tokens=5)) == 5
    assert tokens(chat(agent, model="strict", max_tokens=5)) == 2


def test_a_role_is_a_model_that_is_loaded(agent: AgentProcess) -> None:
    tokens(chat(agent, model="strict"))
    httpx.post(
        f"{agent.base_url}/v1/node/models/chat/unload", headers=agent.operator_headers(), timeout=30, trust_env=False
    ).raise_for_status()
    answer = chat(agent, model="role:planner")
    assert (answer.json()["model"], answer.headers["x-node-model"]) == ("strict", "strict")
    shown = httpx.get(f"{agent.base_url}/v1/models/role:planner", trust_env=False).json()
    assert (shown["id"], shown["roles"]) == ("strict", ["planner"])
    assert chat(agent, model="role:painter").json()["error"]["code"] == "model_not_found"


def test_a_model_that_cant_be_served_is_replaced_by_its_fallback(agent: AgentProcess) -> None:
    answer = chat(agent, model="gone")
    assert tokens(answer) == 3, "the fallback's own default"
    assert answer.headers["x-node-model"] == answer.json()["model"] == "chat"


def test_a_models_own_limit_and_media_by_url_are_refused(agent: AgentProcess) -> None:
    assert chat(agent, model="strict", user="x" * 500).status_code == 413
    parts = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/x.png"}}]
    refused = chat(agent, model="chat", messages=[{"role": "user", "content": parts}])
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "remote_media_forbidden")
    assert refused.json()["error"]["param"] == "messages[0].content[0].image_url.url"
