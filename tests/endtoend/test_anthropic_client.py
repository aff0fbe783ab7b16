"""Anthropic's own client, with the agent as a process and the real llama-server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def agent(llama_server: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    models = [{"model_id": "tiny", "path": str(tiny_model), "ctx_size": 512}]
    with running_agent(write_config(tmp_path_factory.mktemp("agent"), llama_server, models)) as agent:
        yield agent


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=agent.base_url, api_key="none", max_retries=0, timeout=30) as client:
        yield client


def test_it_gets_a_message(client: anthropic.Anthropic) -> None:
    message = client.messages.create(model="tiny", messages=HELLO, max_tokens=8)
    assert (message.role, message.model, message.stop_reason) == ("assistant", "tiny", "max_tokens")
    assert message.usage.output_tokens == 8
    [block] = message.content
    assert block.type == "text"
    assert block.text.strip()


def test_its_streamed_text_is_that_of_the_whole_message(client: anthropic.Anthropic) -> None:
    options: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "extra_body": {"temperature": 0.0}}
    whole = client.messages.create(**options)
    with client.messages.stream(**options) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_message()
    assert [final.content[0].text] == [block.text for block in whole.content if block.type == "text"]  # type: ignore[union-attr]
    assert (events[0], events[-1]) == ("message_start", "message_stop")


def test_it_counts_tokens(client: anthropic.Anthropic) -> None:
    count = client.messages.count_tokens(model="tiny", messages=HELLO)
    assert count.input_tokens > len("hello there")


def test_it_understands_the_errors_of_the_node_and_of_the_server(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        client.messages.create(model="huge", messages=HELLO, max_tokens=8)
    assert unknown.value.body["error"]["type"] == "not_found_error"  # type: ignore[index]
    assert "tiny" in unknown.value.message
    long: Any = [{"role": "user", "content": "hello " * 500}]
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError, match="exceeds the available context size") as refused:
            client.messages.create(model="tiny", messages=long, max_tokens=8, stream=stream)
        assert refused.value.body["type"] == "error"  # type: ignore[index]


def test_a_request_without_messages_is_the_clients_fault(agent: AgentProcess) -> None:
    answer = httpx.post(f"{agent.base_url}/v1/messages", json={"max_tokens": 8}, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["error"] == {"type": "invalid_request_error", "message": "'messages' is missing."}
