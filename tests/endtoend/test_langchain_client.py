"""LangChain's client for OpenAI, with the agent as a process and the real llama-server."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import SecretStr

from fakes.agent_process import AgentProcess, running_agent, write_config


@pytest.fixture(scope="module")
def agent(
    llama_server: Path, tiny_model: Path, embedder_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentProcess]:
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model), "ctx_size": 512},
        {"model_id": "embedder", "path": str(embedder_model)},
    ]
    with running_agent(write_config(tmp_path_factory.mktemp("agent"), llama_server, models)) as agent:
        yield agent


def chat(agent: AgentProcess, model: str = "tiny", **options: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=model,
        base_url=f"{agent.base_url}/v1",
        api_key=SecretStr("none"),
        timeout=30,
        max_retries=0,
        temperature=0,
        stream_usage=True,
        **options,
    )


@pytest.mark.parametrize("responses_api", [False, True])
def test_its_streamed_text_is_that_of_the_whole_message(agent: AgentProcess, responses_api: bool) -> None:
    model = chat(agent, max_completion_tokens=8, use_responses_api=responses_api)
    whole = model.invoke("hello there")
    assert whole.text.strip()
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 8
    pieces = list(model.stream("hello there"))
    assert "".join(piece.text for piece in pieces) == whole.text
    assert [piece.usage_metadata for piece in pieces if piece.usage_metadata]


def test_it_embeds(agent: AgentProcess) -> None:
    # Otherwise it would send tokens of OpenAI's models.
    embeddings = OpenAIEmbeddings(
        model="embedder",
        base_url=f"{agent.base_url}/v1",
        api_key=SecretStr("none"),
        check_embedding_ctx_length=False,
    )
    first, second = embeddings.embed_documents(["one", "two"])
    assert first == pytest.approx(embeddings.embed_query("one"), abs=1e-3)
    assert first != pytest.approx(second, abs=1e-3)


def test_it_understands_the_errors_of_the_node(agent: AgentProcess) -> None:
    with pytest.raises(openai.NotFoundError, match="It serves: tiny, embedder"):
        chat(agent, "huge").invoke("hello")
    with pytest.raises(openai.BadRequestError, match="exceeds the available context size"):
        list(chat(agent).stream("hello " * 500))
