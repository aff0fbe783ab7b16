"""Each path that goes to a model's server, to the agent as a process and the real llama-server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config
from nodeagent.front.endpoints import ENDPOINTS

HELLO: list[dict[str, Any]] = [{"role": "user", "content": "hello"}]
RANK: dict[str, Any] = {"model": "reranker", "query": "hello", "documents": ["one", "two"]}

# A body for each path, and a key of the answer.
BODIES: dict[str, tuple[dict[str, Any], str]] = {
    "/v1/chat/completions": ({"messages": HELLO, "max_tokens": 2}, "choices"),
    "/v1/chat/completions/input_tokens": ({"messages": HELLO}, "input_tokens"),
    "/v1/completions": ({"prompt": "hello", "max_tokens": 2}, "choices"),
    "/v1/responses": ({"input": "hello", "max_output_tokens": 2}, "output"),
    "/v1/responses/input_tokens": ({"input": "hello"}, "input_tokens"),
    "/v1/embeddings": ({"model": "embedder", "input": ["one", "two", "three"]}, "data"),
    "/v1/rerank": (RANK, "results"),
    "/v1/reranking": (RANK, "results"),
    "/v1/messages": ({"messages": HELLO, "max_tokens": 2}, "content"),
    "/v1/messages/count_tokens": ({"messages": HELLO}, "input_tokens"),
    "/completion": ({"prompt": "hello", "n_predict": 2}, "tokens_predicted"),
    # The tiny model has no tokens for it.
    "/infill": ({"input_prefix": "a", "input_suffix": "b", "n_predict": 2}, "error"),
    "/embedding": ({"model": "embedder", "content": "one"}, "embedding"),
    "/embeddings": ({"model": "embedder", "content": "one"}, "embedding"),
    "/tokenize": ({"content": "hello"}, "tokens"),
    "/detokenize": ({"tokens": [262]}, "content"),
    "/apply-template": ({"messages": HELLO}, "prompt"),
    "/api/chat": ({"messages": HELLO, "stream": False, "options": {"num_predict": 2}}, "message"),
    "/api/generate": ({"prompt": "hello", "stream": False, "options": {"num_predict": 2}}, "response"),
    "/api/embed": ({"model": "embedder", "input": "one"}, "embeddings"),
    "/api/embeddings": ({"model": "embedder", "prompt": "one"}, "embedding"),
}


@pytest.fixture(scope="module")
def agent(
    llama_server: Path,
    tiny_model: Path,
    slow_model: Path,
    embedder_model: Path,
    reranker_model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[AgentProcess]:
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model), "default": True},
        {"model_id": "slow", "path": str(slow_model), "threads": 1},
        {"model_id": "embedder", "path": str(embedder_model)},
        {"model_id": "reranker", "path": str(reranker_model)},
    ]
    folder = tmp_path_factory.mktemp("agent")
    with running_agent(write_config(folder, llama_server, models, max_pending_requests_per_device=4)) as agent:
        yield agent


@pytest.fixture
def http(agent: AgentProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=agent.base_url, timeout=60, trust_env=False) as http:
        yield http


@pytest.mark.parametrize("path", BODIES)
def test_each_path_is_answered_by_the_server(path: str, http: httpx.Client) -> None:
    body, key = BODIES[path]
    answer = http.post(path, json=body)
    assert answer.status_code == (501 if key == "error" else 200), answer.text
    content = answer.json()[0] if isinstance(answer.json(), list) else answer.json()
    assert key in content
    assert answer.headers["x-node-device"] == "cpu:0"


def test_each_path_is_tried_here() -> None:
    assert set(ENDPOINTS) == {*BODIES, "/v1/audio/transcriptions"}


def test_a_recording_reaches_the_server_of_the_model_that_is_named_after_it(http: httpx.Client) -> None:
    form: Any = {"file": ("speech.wav", b"RIFF", "audio/wav"), "model": (None, "slow")}
    for path in ("/v1/audio/transcriptions", "/audio/transcriptions"):
        answer = http.post(path, files=form)
        assert (answer.status_code, answer.json()["error"]["type"]) == (501, "not_supported_error")
        assert "does not support audio" in answer.json()["error"]["message"]
    [loaded] = [model for model in http.get("/v1/models").json()["data"] if model["status"]["value"] == "loaded"]
    assert loaded["id"] == "slow"
    unknown = http.post("/v1/audio/transcriptions", files={**form, "model": (None, "huge")})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


def test_embeddings_keep_the_order_of_their_inputs(http: httpx.Client) -> None:
    texts = ["one", "two", "three"]
    together = http.post("/v1/embeddings", json={"model": "embedder", "input": texts}).json()["data"]
    assert [item["index"] for item in together] == [0, 1, 2]
    for text, item in zip(texts, together, strict=True):
        [alone] = http.post("/v1/embeddings", json={"model": "embedder", "input": text}).json()["data"]
        assert alone["embedding"] == pytest.approx(item["embedding"], abs=1e-3)


def test_tokens_are_the_text_again(http: httpx.Client) -> None:
    tokens = http.post("/tokenize", json={"content": "baba hello"}).json()["tokens"]
    text = http.post("/detokenize", json={"tokens": tokens}).json()["content"]
    assert text.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").strip() == "baba hello"


def test_what_needs_no_slot_is_answered_while_the_only_one_is_busy(http: httpx.Client) -> None:
    body = {"model": "slow", "messages": HELLO, "max_tokens": 4000, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as stream:
        events = stream.iter_lines()
        assert next(events)
        for path in ("/tokenize", "/v1/messages/count_tokens", "/apply-template"):
            answer = http.post(path, json={**BODIES[path][0], "model": "slow"})
            assert (answer.status_code, answer.headers["x-node-load-ms"]) == (200, "0")
        assert [lane["in_flight"] for lane in http.get("/v1/node/queue").json()["lanes"]] == [1]


def test_a_text_may_be_as_long_as_the_context(http: httpx.Client) -> None:
    body = {"model": "embedder", "input": "hello " * 300}  # 2400 tokens
    assert http.post("/v1/embeddings", json=body).json()["usage"]["prompt_tokens"] > 2048
    refused = http.post("/v1/embeddings", json={"model": "embedder", "input": "hello " * 600})
    assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
    assert "too large" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "model", "able"),
    [
        ("/v1/embeddings", "tiny", "embedder"),
        ("/v1/rerank", "embedder", "reranker"),
        ("/v1/chat/completions", "reranker", "tiny, slow"),
        ("/v1/messages", "embedder", "tiny, slow"),
    ],
)
def test_what_a_model_is_not_for_is_refused_and_nothing_is_loaded_for_it(
    path: str, model: str, able: str, http: httpx.Client, agent: AgentProcess
) -> None:
    http.post("/v1/completions", json=BODIES["/v1/completions"][0]).raise_for_status()  # loads tiny, if it is not
    [child] = agent.children()
    refused = http.post(path, json={**BODIES[path][0], "model": model})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"].endswith(f"These are: {able}.")
    assert [it.pid for it in agent.children()] == [child.pid]


def test_models_are_listed_with_what_they_are_for_and_their_state(http: httpx.Client) -> None:
    http.post("/v1/completions", json=BODIES["/v1/completions"][0]).raise_for_status()
    models = {model["id"]: model for model in http.get("/v1/models").json()["data"]}
    assert {model_id: model["task"] for model_id, model in models.items()} == {
        "tiny": "chat",
        "slow": "chat",
        "embedder": "embedding",
        "reranker": "rerank",
    }
    assert models["tiny"]["status"] == {"value": "loaded", "failed": False}
    assert models["embedder"]["status"]["value"] == "unloaded"
    assert models["tiny"]["meta"]["n_ctx_train"] == 4096
    assert http.get("/v1/models/tiny").json() == models["tiny"]


def test_the_loaded_server_shows_its_properties_and_slots_and_another_is_not_loaded_for_that(
    http: httpx.Client, agent: AgentProcess
) -> None:
    http.post("/v1/completions", json=BODIES["/v1/completions"][0]).raise_for_status()
    [child] = agent.children()
    assert http.get("/props").json()["total_slots"] == 1
    assert [slot["id"] for slot in http.get("/slots", params={"model": "tiny"}).json()] == [0]
    refused = http.get("/slots", params={"model": "embedder"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "model_not_loaded")
    assert http.get("/props", params={"model": "huge"}).json()["error"]["code"] == "model_not_found"
    assert http.post("/props", json={}).status_code == 405
    assert [it.pid for it in agent.children()] == [child.pid]


def test_the_reasoning_of_a_completion_in_progress_is_ended_although_no_slot_is_free(http: httpx.Client) -> None:
    body = {"model": "slow", "messages": HELLO, "max_tokens": 3000, "stream": True, "reasoning_control": True}
    order = {"action": "reasoning_end"}
    with http.stream("POST", "/v1/chat/completions", json=body) as stream:
        events = (json.loads(line[6:]) for line in stream.iter_lines() if line.startswith("data: {"))
        identity = next(event["id"] for event in events if event["choices"][0]["delta"].get("content"))
        ended = http.post("/v1/chat/completions/control", json=order | {"id": identity})
        assert (ended.status_code, ended.json()) == (200, {"success": True})
        unknown = http.post("/chat/completions/control", json=order | {"id": "chatcmpl-other", "model": "slow"})
        assert (unknown.status_code, unknown.json()["success"]) == (200, False)
        refused = http.post("/v1/chat/completions/control", json={"id": identity, "action": "dance"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")


def test_the_openai_client_embeds(agent: AgentProcess) -> None:
    with openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        # By default this client asks for base64.
        embedded = client.embeddings.create(model="embedder", input=["one", "two"])
        plain = client.embeddings.create(model="embedder", input=["one", "two"], encoding_format="float")
        assert [item.embedding for item in embedded.data] == [
            pytest.approx(item.embedding, abs=1e-6) for item in plain.data
        ]
        with pytest.raises(openai.BadRequestError, match="These are: embedder") as refused:
            client.embeddings.create(model="tiny", input="one")
        assert refused.value.code == "wrong_task"
        with pytest.raises(openai.BadRequestError, match="must not be an empty list"):
            client.embeddings.create(model="embedder", input=[])


def test_rerank_has_the_format_of_text_embeddings_inference_too(http: httpx.Client) -> None:
    body = {"model": "reranker", "query": "hello", "texts": ["one", "two"]}
    ranked = http.post("/rerank", json=body).json()
    assert {item["index"] for item in ranked} == {0, 1}
    assert ranked[0]["score"] >= ranked[1]["score"]
