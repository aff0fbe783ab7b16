"""Ollama's own client, with the agent as a process and the real llama-server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]
SHORT: Any = {"num_predict": 6, "temperature": 0}


@pytest.fixture(scope="module")
def agent(
    llama_server: Path,
    tiny_model: Path,
    slow_model: Path,
    embedder_model: Path,
    smollm2: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[AgentProcess]:
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model), "ctx_size": 512},
        {"model_id": "slow", "path": str(slow_model), "threads": 1},
        {"model_id": "embedder", "path": str(embedder_model)},
        {"model_id": "smollm2", "path": str(smollm2), "ctx_size": 1024},
    ]
    folder = tmp_path_factory.mktemp("agent")
    keys: Any = {"max_pending_requests_per_device": 2, "stream_ping_s": 0.2}
    with running_agent(write_config(folder, llama_server, models, **keys)) as agent:
        yield agent


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[ollama.Client]:
    with ollama.Client(host=agent.base_url, timeout=30, trust_env=False) as client:
        yield client


def test_its_streamed_chat_is_that_of_the_whole_answer(client: ollama.Client) -> None:
    whole = client.chat("tiny", HELLO, options=SHORT)
    assert (whole.model, whole.done, whole.done_reason) == ("tiny", True, "length")
    assert whole.message.role == "assistant"
    *pieces, last = client.chat("tiny:latest", HELLO, options=SHORT, stream=True)
    assert "".join(piece.message.content or "" for piece in pieces) == whole.message.content
    assert not any(piece.done for piece in pieces)
    assert (last.done, last.done_reason, last.eval_count) == (True, "length", 6)
    for figure in (last.total_duration, last.eval_duration, last.prompt_eval_duration, last.prompt_eval_count):
        assert figure
    assert whole.prompt_eval_count == last.prompt_eval_count


def test_it_generates_with_and_without_the_template(client: ollama.Client) -> None:
    made = client.generate("tiny", "hello", system="be brief", options=SHORT)
    assert (made.done_reason, made.eval_count) == ("length", 6)
    raw = client.generate("tiny", "hello", raw=True, options=SHORT)
    assert (raw.prompt_eval_count or 0) < (made.prompt_eval_count or 0), "no system prompt, no template"
    pieces = [piece.response or "" for piece in client.generate("tiny", "hello", raw=True, stream=True, options=SHORT)]
    assert "".join(pieces) == raw.response


def test_its_format_is_kept_to(client: ollama.Client) -> None:
    schema: Any = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    answer = client.chat("smollm2", HELLO, format=schema, options={"num_predict": 200, "temperature": 0})
    assert set(json.loads(answer.message.content or "")) == {"a"}


def test_it_embeds_as_the_other_paths_do(client: ollama.Client, agent: AgentProcess) -> None:
    embedded = client.embed("embedder", ["one", "two"])
    body = {"model": "embedder", "input": ["one", "two"]}
    data = httpx.post(f"{agent.base_url}/v1/embeddings", json=body, timeout=30, trust_env=False).json()["data"]
    for ours, theirs in zip(embedded.embeddings, data, strict=True):
        assert ours == pytest.approx(theirs["embedding"], abs=1e-6)
    assert client.embeddings("embedder", "one").embedding == pytest.approx(embedded.embeddings[0], abs=1e-3)
    assert len(client.embed("embedder", "one", dimensions=8).embeddings[0]) == 8


def test_it_sees_the_models_and_loads_one_without_a_prompt(client: ollama.Client) -> None:
    assert [model.model for model in client.list().models] == ["tiny", "slow", "embedder", "smollm2"]
    assert client.chat("tiny").done_reason == "load"
    [loaded] = client.ps().models
    assert (loaded.model, loaded.context_length) == ("tiny", 512)
    shown = client.show("tiny:latest")
    assert shown.capabilities == ["completion", "tools"]
    assert shown.details is not None
    assert shown.details.family == "llama"
    assert client.show("embedder").capabilities == ["embedding"]
    assert client.generate("tiny", keep_alive=0).done_reason == "unload"
    assert [model.model for model in client.ps().models] == ["tiny"], "the node decides what stays loaded"


def test_it_understands_the_errors_of_the_node_and_of_the_server(client: ollama.Client) -> None:
    with pytest.raises(ollama.ResponseError, match="The model 'huge' is not served here") as unknown:
        client.chat("huge", HELLO)
    assert unknown.value.status_code == 404
    long: Any = [{"role": "user", "content": "hello " * 500}]
    with pytest.raises(ollama.ResponseError, match="exceeds the available context size") as refused:
        client.chat("tiny", long)
    assert refused.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="exceeds the available context size"):
        list(client.chat("tiny", long, stream=True))
    with pytest.raises(ollama.ResponseError, match="These are: embedder") as wrong:
        client.embed("tiny", "one")
    assert wrong.value.status_code == 400
    with pytest.raises(ollama.ResponseError, match="there is no such path"):
        client.pull("tiny")


def test_a_server_that_dies_in_mid_stream_is_an_error_and_never_an_end(
    client: ollama.Client, agent: AgentProcess
) -> None:
    stream = client.chat("slow", HELLO, stream=True, options={"num_predict": 4000})
    while not next(stream).message.content:
        pass  # it loads
    agent.wait_child().kill()
    pieces: list[ollama.ChatResponse] = []
    with pytest.raises(ollama.ResponseError, match="crashed during this request"):
        pieces.extend(stream)
    assert not any(piece.done for piece in pieces)


def test_a_stream_that_waits_gets_empty_pieces_and_one_more_request_a_429(client: ollama.Client) -> None:
    endless: Any = {"num_predict": 4000}
    running = client.chat("slow", HELLO, stream=True, options=endless)
    while not next(running).message.content:
        pass  # it loads
    waiting = client.chat("slow", HELLO, stream=True, options=endless)
    assert [(piece.message.content, piece.done) for piece in (next(waiting), next(waiting))] == [("", False)] * 2
    with pytest.raises(ollama.ResponseError, match="already has 2 requests in flight or queued") as refused:
        client.chat("slow", HELLO)
    assert refused.value.status_code == 429
    running.close()  # type: ignore[attr-defined]
    while not next(waiting).message.content:
        pass  # the first one's client has left
    waiting.close()  # type: ignore[attr-defined]
