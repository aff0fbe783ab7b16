"""litellm, by three of its providers, with the agent as a process and the real llama-server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config
from fakes.litellm_process import LiteLlm, running_litellm
from nodeagent.config.api_keys import digest_of

HELLO = [{"role": "user", "content": "hello there"}]
LONG = [{"role": "user", "content": "hello " * 500}]
KEY = "a-key-of-the-test"
# The ends of the base URL, by provider.
PROVIDERS = {"openai": "/v1", "anthropic": "", "ollama_chat": ""}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "is_hot",
        "parameters": {"type": "object", "properties": {"now": {"type": "boolean"}}, "required": ["now"]},
    },
}


@pytest.fixture(scope="module")
def agent(
    llama_server: Path,
    tiny_model: Path,
    tools_model: Path,
    embedder_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[AgentProcess]:
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model), "ctx_size": 512},
        {"model_id": "tools", "path": str(tools_model), "ctx_size": 1024},
        {"model_id": "embedder", "path": str(embedder_model)},
    ]
    keys: Any = {"api_keys": [{"name": "alice", "sha256": digest_of(KEY)}]}
    with running_agent(write_config(tmp_path_factory.mktemp("agent"), llama_server, models, **keys)) as agent:
        yield agent


@pytest.fixture(scope="module")
def litellm() -> Iterator[LiteLlm]:
    with running_litellm() as litellm:
        yield litellm


def options(agent: AgentProcess, provider: str, model: str = "tiny", **more: Any) -> dict[str, Any]:
    base = agent.base_url + PROVIDERS[provider]
    common = {"api_base": base, "api_key": KEY, "timeout": 60, "max_retries": 0, "temperature": 0, "max_tokens": 8}
    return {"model": f"{provider}/{model}", "messages": HELLO, **common, **more}


@pytest.mark.parametrize("provider", PROVIDERS)
def test_its_streamed_text_is_that_of_the_whole_message(agent: AgentProcess, litellm: LiteLlm, provider: str) -> None:
    whole = litellm.call("completion", **options(agent, provider))["answer"]
    [choice] = whole["choices"]
    assert choice["message"]["content"].strip()
    assert whole["usage"]["completion_tokens"] == 8
    asked = options(agent, provider, stream=True, stream_options={"include_usage": True})
    pieces = litellm.call("completion", **asked)["pieces"]
    chosen = [piece["choices"][0] for piece in pieces if piece["choices"]]
    assert "".join(one["delta"]["content"] or "" for one in chosen) == choice["message"]["content"]
    assert [piece["usage"]["completion_tokens"] for piece in pieces if piece.get("usage")][-1:] == [8]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_it_gets_the_call_of_a_tool(agent: AgentProcess, litellm: LiteLlm, provider: str) -> None:
    asked = options(agent, provider, "tools", tools=[TOOL], max_tokens=200)
    [choice] = litellm.call("completion", **asked)["answer"]["choices"]
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls"
    assert call["function"]["name"] == "is_hot"
    assert set(json.loads(call["function"]["arguments"])) == {"now"}


def test_it_embeds(agent: AgentProcess, litellm: LiteLlm) -> None:
    vectors = []
    for provider, end in (("openai", "/v1"), ("ollama", "")):
        asked = {"model": f"{provider}/embedder", "api_base": agent.base_url + end, "api_key": KEY, "timeout": 60}
        data = litellm.call("embedding", input=["one", "two"], **asked)["answer"]["data"]
        vectors.append([item["embedding"] for item in data])
    for ours, ollamas in zip(*vectors, strict=True):
        assert ours == pytest.approx(ollamas, abs=1e-6)
    assert vectors[0][0] != pytest.approx(vectors[0][1], abs=1e-3)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("changed", "error", "words"),
    [
        ({"model": "huge"}, "NotFoundError", "is not served here. It serves: tiny"),
        ({"api_key": "wrong"}, "AuthenticationError", "is not valid on this node"),
        ({"model": "embedder"}, "BadRequestError", "These are: tiny, tools"),
    ],
    ids=["unknown model", "wrong key", "wrong task"],
)
def test_it_maps_the_errors_of_the_node(
    agent: AgentProcess, litellm: LiteLlm, provider: str, changed: dict[str, str], error: str, words: str
) -> None:
    asked = options(agent, provider) | changed
    asked["model"] = f"{provider}/{changed.get('model', 'tiny')}"
    for stream in (False, True):
        refused = litellm.call("completion", **asked, stream=stream)
        assert refused.get("error") == error, refused
        assert words in refused["message"]


# Of Ollama's errors it reads only the status.
@pytest.mark.parametrize(
    ("provider", "error"),
    [
        ("openai", "ContextWindowExceededError"),
        ("anthropic", "ContextWindowExceededError"),
        ("ollama_chat", "BadRequestError"),
    ],
)
def test_it_understands_that_a_prompt_is_too_long(
    agent: AgentProcess, litellm: LiteLlm, provider: str, error: str
) -> None:
    refused = litellm.call("completion", **options(agent, provider, messages=LONG))
    assert refused.get("error") == error, refused
