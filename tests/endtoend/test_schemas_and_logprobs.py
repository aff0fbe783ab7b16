"""Answers that keep to a schema or a grammar, and the odds of their tokens, which come as the server tells them.

The agent is a process, the llama-server the real one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from fakes.agent_process import AgentProcess, running_agent, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]


class Weather(BaseModel):
    """What the model is to say."""

    city: Literal["gode", "wuba"]
    hot: bool
    winds: list[Literal["north", "south"]]


@pytest.fixture(scope="module")
def agent(
    llama_server: Path, tiny_model: Path, tools_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentProcess]:
    greedy = {"temperature": 0}
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model), "ctx_size": 512, "defaults": greedy},
        {"model_id": "tools", "path": str(tools_model), "ctx_size": 1024, "defaults": greedy},
    ]
    with running_agent(write_config(tmp_path_factory.mktemp("agent"), llama_server, models)) as agent:
        yield agent


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def http(agent: AgentProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=agent.base_url, timeout=60, trust_env=False) as http:
        yield http


def test_the_openai_clients_answer_is_parsed_by_its_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model="tools", messages=HELLO, response_format=Weather, max_tokens=400)
    assert isinstance(answer.choices[0].message.parsed, Weather)
    assert answer.choices[0].finish_reason == "stop"


def test_a_stream_keeps_to_its_schema_too(client: openai.OpenAI) -> None:
    schema: Any = {"name": "weather", "schema": Weather.model_json_schema(), "strict": True}
    stream = client.chat.completions.create(
        model="tools",
        messages=HELLO,
        response_format={"type": "json_schema", "json_schema": schema},
        max_tokens=400,
        stream=True,
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 8
    Weather.model_validate_json("".join(pieces))


def test_a_json_object_is_one(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tools",
        messages=HELLO,
        response_format={"type": "json_object"},
        max_tokens=400,
        extra_body={"json_schema": {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}},
    )
    assert set(json.loads(answer.choices[0].message.content or "")) == {"a"}


@pytest.mark.parametrize("path", ["/completion", "/v1/completions"])
def test_a_grammar_is_kept_to(http: httpx.Client, path: str) -> None:
    body = {"model": "tiny", "prompt": "hello", "max_tokens": 40, "n_predict": 40, "grammar": 'root ::= "yes" | "no"'}
    answer = http.post(path, json=body).json()
    assert (answer["content"] if path == "/completion" else answer["choices"][0]["text"]) in ("yes", "no")


def test_a_grammar_that_cannot_be_read_is_the_clients_fault(http: httpx.Client) -> None:
    refused = http.post(
        "/completion", json={"model": "tiny", "prompt": "hello", "n_predict": 4, "grammar": "root ::= ["}
    )
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "grammar" in refused.json()["error"]["message"]


def asked_of_the_server(agent: AgentProcess, path: str, body: dict[str, Any]) -> httpx.Response:
    """What the loaded server itself answers."""
    child = agent.wait_child()
    [address] = [link.laddr for link in child.net_connections("tcp") if link.status == "LISTEN"]
    headers = {"Authorization": f"Bearer {child.environ()['LLAMA_API_KEY']}"}
    return httpx.post(f"http://127.0.0.1:{address.port}{path}", json=body, headers=headers, timeout=60, trust_env=False)


@pytest.mark.parametrize(
    ("path", "body", "told"),
    [
        ("/v1/chat/completions", {"messages": HELLO, "logprobs": True, "top_logprobs": 3}, "choices"),
        ("/v1/completions", {"prompt": "hello", "logprobs": 3}, "choices"),
        ("/completion", {"prompt": "hello", "n_probs": 3}, "completion_probabilities"),
        ("/completion", {"prompt": "hello", "n_probs": 3, "post_sampling_probs": True}, "completion_probabilities"),
    ],
)
def test_the_odds_of_tokens_come_as_the_server_tells_them(
    agent: AgentProcess, http: httpx.Client, path: str, body: dict[str, Any], told: str
) -> None:
    # Without the cache each answer is worked out anew, in the same way.
    body = body | {"model": "tiny", "max_tokens": 5, "n_predict": 5, "temperature": 0, "cache_prompt": False}
    through = http.post(path, json=body)
    assert through.status_code == 200
    direct = asked_of_the_server(agent, path, body)
    assert direct.status_code == 200
    assert through.json()[told] == direct.json()[told]
    assert "prob" in through.text


def test_a_stream_tells_the_odds_of_each_token(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 6, "logprobs": True, "top_logprobs": 2}
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(**asked, stream=True)
    streamed = [
        odds
        for chunk in stream
        for choice in chunk.choices
        if choice.logprobs is not None
        for odds in choice.logprobs.content or []
    ]
    assert whole.choices[0].logprobs is not None
    assert [odds.token for odds in streamed] == [odds.token for odds in whole.choices[0].logprobs.content or []]
    assert len(streamed) == 6
    assert all(len(odds.top_logprobs) == 2 for odds in streamed)
