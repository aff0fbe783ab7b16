"""Calls of tools by the clients of OpenAI, Anthropic and Ollama, with the agent as a process and the real llama-server.

The model is a tiny one that calls a tool whenever it is given one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

ASK: Any = [{"role": "user", "content": "is it hot in gode?"}]
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["gode", "wuba"]}, "now": {"type": "boolean"}},
    "required": ["city", "now"],
}
DESCRIPTION = "Whether it is hot in a city."
TOOL: Any = {"type": "function", "function": {"name": "is_hot", "description": DESCRIPTION, "parameters": PARAMETERS}}
ANTHROPIC_TOOL: Any = {"name": "is_hot", "description": DESCRIPTION, "input_schema": PARAMETERS}
RESPONSES_TOOL: Any = {"type": "function", "name": "is_hot", "parameters": PARAMETERS, "strict": True}


@pytest.fixture(scope="module")
def agent(llama_server: Path, tools_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    models = [{"model_id": "tools", "path": str(tools_model), "ctx_size": 2048, "defaults": {"temperature": 0}}]
    with running_agent(write_config(tmp_path_factory.mktemp("agent"), llama_server, models)) as agent:
        yield agent


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def claude(agent: AgentProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=agent.base_url, api_key="none", max_retries=0, timeout=60) as claude:
        yield claude


def assert_fits(arguments: Any) -> None:
    """They are what the tool takes."""
    assert set(arguments) == {"city", "now"}
    assert arguments["city"] in PARAMETERS["properties"]["city"]["enum"]
    assert isinstance(arguments["now"], bool)


@pytest.mark.parametrize(
    "choice", ["auto", "required", {"type": "function", "function": {"name": "is_hot"}}], ids=["auto", "required", "it"]
)
def test_the_openai_client_gets_a_call_and_gives_its_result(client: openai.OpenAI, choice: Any) -> None:
    answer = client.chat.completions.create(model="tools", messages=ASK, tools=[TOOL], tool_choice=choice)
    [chosen] = answer.choices
    assert chosen.finish_reason == "tool_calls"
    assert chosen.message.tool_calls is not None
    [call] = chosen.message.tool_calls
    assert call.type == "function"
    assert call.function.name == "is_hot"
    assert_fits(json.loads(call.function.arguments))
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "yes"}
    after = client.chat.completions.create(
        model="tools",
        messages=[*ASK, chosen.message.to_dict(), result],  # type: ignore[list-item]
        tools=[TOOL],
    )
    assert answer.usage is not None
    assert after.usage is not None
    assert after.usage.prompt_tokens > answer.usage.prompt_tokens, "the call and its result are in the prompt"


def test_no_tool_is_called_where_the_client_forbids_it(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tools", messages=ASK, tools=[TOOL], tool_choice="none", max_tokens=4)
    assert answer.choices[0].message.tool_calls is None


def test_the_openai_clients_streamed_call_is_that_of_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tools", messages=ASK, tools=[TOOL]).choices[0].message.tool_calls
    stream = client.chat.completions.create(model="tools", messages=ASK, tools=[TOOL], stream=True)
    chosen = [chunk.choices[0] for chunk in stream if chunk.choices]
    pieces = [call.function for one in chosen for call in one.delta.tool_calls or [] if call.function is not None]
    assert whole is not None
    [call] = whole
    assert call.type == "function"
    assert "".join(piece.name or "" for piece in pieces) == call.function.name
    assert "".join(piece.arguments or "" for piece in pieces) == call.function.arguments
    assert len(pieces) > 2, "the arguments come as they are generated"
    assert [one.finish_reason for one in chosen if one.finish_reason] == ["tool_calls"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_openai_client_gets_a_call_by_the_responses_api(client: openai.OpenAI, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "tools", "input": "is it hot?", "tools": [RESPONSES_TOOL]}
    if stream:
        events = list(client.responses.create(**asked, stream=True))
        [output] = [event.item for event in events if event.type == "response.output_item.done"]
        deltas = [event.delta for event in events if event.type == "response.function_call_arguments.delta"]
        assert output.type == "function_call"
        assert "".join(deltas) == output.arguments
    else:
        [output] = client.responses.create(**asked).output
    assert output.type == "function_call"
    assert output.name == "is_hot"
    assert_fits(json.loads(output.arguments))


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}], ids=["auto", "any"])
def test_the_anthropic_client_gets_a_call_and_gives_its_result(claude: anthropic.Anthropic, choice: Any) -> None:
    asked: dict[str, Any] = {"model": "tools", "max_tokens": 500, "tools": [ANTHROPIC_TOOL], "tool_choice": choice}
    message = claude.messages.create(**asked, messages=ASK)
    assert message.stop_reason == "tool_use"
    [use] = uses(message)
    assert use.name == "is_hot"
    assert_fits(use.input)
    result: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "yes"}]}
    said: Any = {"role": "assistant", "content": [block.to_dict() for block in message.content]}
    after = claude.messages.create(**asked, messages=[*ASK, said, result])

    def prompt_tokens(usage: anthropic.types.Usage) -> int:
        return usage.input_tokens + (usage.cache_read_input_tokens or 0)

    assert prompt_tokens(after.usage) > prompt_tokens(message.usage)


def test_the_anthropic_clients_streamed_call_is_that_of_the_whole_message(claude: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "tools", "max_tokens": 500, "tools": [ANTHROPIC_TOOL], "messages": ASK}
    whole = claude.messages.create(**asked)
    with claude.messages.stream(**asked) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert len(pieces) > 2
    [use] = uses(final)
    assert (use.name, use.input) == (uses(whole)[0].name, uses(whole)[0].input)
    assert json.loads("".join(pieces)) == use.input
    assert final.stop_reason == "tool_use"


def uses(message: Any) -> list[Any]:
    """The calls in a message."""
    return [block for block in message.content if block.type == "tool_use"]


@pytest.mark.parametrize("stream", [False, True])
def test_the_ollama_client_gets_a_call_and_gives_its_result(agent: AgentProcess, stream: bool) -> None:
    with ollama.Client(host=agent.base_url, timeout=60, trust_env=False) as client:
        if stream:
            pieces = list(client.chat("tools", ASK, tools=[TOOL], stream=True))
        else:
            pieces = [client.chat("tools", ASK, tools=[TOOL])]
        [call] = [call for piece in pieces for call in piece.message.tool_calls or []]
        assert call.function.name == "is_hot"
        assert_fits(call.function.arguments)
        assert [piece.done for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        said = {"role": "assistant", "tool_calls": [call.model_dump()]}
        result = {"role": "tool", "tool_name": "is_hot", "content": "yes"}
        after = client.chat("tools", [*ASK, said, result], tools=[TOOL])
        assert (after.prompt_eval_count or 0) > (pieces[-1].prompt_eval_count or 0)
