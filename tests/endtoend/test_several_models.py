"""Several models side by side on one device: the agent as a process, with real llama-servers."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]
REQUESTS = 60


@pytest.fixture(scope="module")
def agent(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, slow_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentProcess]:
    """One CPU device that has two models at a time, of three."""
    models: list[dict[str, Any]] = [
        {"model_id": "a", "path": str(tiny_model)},
        {"model_id": "b", "path": str(tiny_model_b)},
        {"model_id": "slow", "path": str(slow_model), "threads": 1, "pinned": True},
    ]
    keys = {"max_models_per_device": 2, "concurrent_models": True, "max_pending_requests_per_device": 16}
    with running_agent(write_config(tmp_path_factory.mktemp("agent"), llama_server, models, **keys)) as agent:
        yield agent


@pytest.fixture
def http(agent: AgentProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=agent.base_url, timeout=60, trust_env=False) as http:
        yield http


def ask(http: httpx.Client, model: str, max_tokens: int = 2, **more: Any) -> httpx.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": max_tokens, **more}
    answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer


def servers(http: httpx.Client) -> dict[str, int]:
    """The generation of each server that is ready, by model."""
    [device] = http.get("/v1/node/inventory").json()["devices"]
    return {it["model_id"]: it["generation"] for it in device["servers"] if it["state"] == "ready"}


def test_requests_for_two_models_in_turns_switch_no_server(http: httpx.Client) -> None:
    for model in ("a", "b"):
        ask(http, model)
    before = servers(http)
    assert before.keys() == {"a", "b"}
    with ThreadPoolExecutor(8) as threads:
        served = list(threads.map(lambda number: ask(http, "ab"[number % 2]), range(REQUESTS)))
    assert {it.headers["x-node-load-ms"] for it in served} == {"0"}
    assert servers(http) == before


def test_chat_embedding_and_rerank_on_one_device_switch_no_server_once_they_are_loaded(
    llama_server: Path, tiny_model: Path, embedder_model: Path, reranker_model: Path, tmp_path: Path
) -> None:
    files = {"chat": tiny_model, "embedder": embedder_model, "reranker": reranker_model}
    models: list[dict[str, Any]] = [{"model_id": name, "path": str(path)} for name, path in files.items()]
    keys = {"max_models_per_device": 3, "concurrent_models": True, "max_pending_requests_per_device": 16}
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"model": "chat", "messages": HELLO, "max_tokens": 2}),
        ("/v1/embeddings", {"model": "embedder", "input": "hello"}),
        ("/v1/rerank", {"model": "reranker", "query": "hello", "documents": ["hello there", "the sun"]}),
    ]
    with (
        running_agent(write_config(tmp_path, llama_server, models, **keys)) as agent,
        httpx.Client(base_url=agent.base_url, timeout=60, trust_env=False) as http,
    ):
        for path, body in bodies:
            assert http.post(path, json=body).status_code == 200
        before = servers(http)
        assert before.keys() == files.keys()
        with ThreadPoolExecutor(8) as threads:
            mixed = [bodies[number % 3] for number in range(2 * REQUESTS)]
            served = list(threads.map(lambda it: http.post(it[0], json=it[1]), mixed))
        assert {it.status_code for it in served} == {200}
        assert {it.headers["x-node-load-ms"] for it in served} == {"0"}
        assert servers(http) == before


def test_a_third_model_takes_the_place_of_one_and_its_long_answer_does_not_hold_up_the_other(
    http: httpx.Client,
) -> None:
    for model in ("b", "a"):
        ask(http, model)
    before = servers(http)
    body = {"model": "slow", "messages": HELLO, "max_tokens": 4000, "stream": True}
    with http.stream("POST", "/v1/chat/completions", json=body) as long:
        pieces = long.iter_raw()  # kept: the connection is closed with it
        next(pieces)
        now = servers(http)
        [kept] = now.keys() & before.keys()
        assert now.keys() == {kept, "slow"}
        assert now[kept] == before[kept], "it ran on"
        assert ask(http, kept).headers["x-node-load-ms"] == "0"
        [lane] = http.get("/v1/node/queue").json()["lanes"]
        assert (lane["in_flight"], [it["model_id"] for it in lane["tickets"]]) == (1, ["slow"]), "it still runs"
    [gone] = before.keys() - {kept}
    ask(http, gone)
    assert servers(http).keys() == {gone, "slow"}, "the pinned model stays"
