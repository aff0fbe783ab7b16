"""The agent as a process, real llama-servers, real clients: what its users do."""

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fakes.agent_process import AgentProcess, running_agent, seconds_to_idle, write_config
from fakes.waiting import wait_until

HELLO: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def agent(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, slow_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentProcess]:
    """One CPU device, two quick models and one that takes long."""
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model), "alias": "small", "roles": ["planner"]},
        {"model_id": "tiny-b", "path": str(tiny_model_b)},
        {"model_id": "slow", "path": str(slow_model), "threads": 1},
    ]
    folder = tmp_path_factory.mktemp("agent")
    with running_agent(write_config(folder, llama_server, models, max_pending_requests_per_device=4)) as agent:
        yield agent


@pytest.fixture
def client(agent: AgentProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key="none", max_retries=0, timeout=30) as client:
        yield client


@pytest.fixture
def http(agent: AgentProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=agent.base_url, timeout=30, trust_env=False) as http:
        yield http


def chat(model: str, max_tokens: int = 8, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": HELLO, "max_tokens": max_tokens, **more}


def test_the_openai_client_chats(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8)
    assert answer.choices[0].message.content
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_the_openai_client_streams(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=16, stream=True)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 8
    assert "".join(pieces).strip()


def test_the_openai_client_lists_the_models_and_finds_one_by_its_alias(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "tiny-b", "slow"]
    assert client.models.retrieve("small").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")


@pytest.mark.parametrize("asked", ["tiny", "small"])
def test_answers_name_the_models_id_whether_it_was_asked_by_id_or_by_alias(client: openai.OpenAI, asked: str) -> None:
    whole = client.chat.completions.create(model=asked, messages=HELLO, max_tokens=2)
    streamed = client.chat.completions.create(model=asked, messages=HELLO, max_tokens=2, stream=True)
    text = client.completions.create(model=asked, prompt="hello", max_tokens=2)
    assert {whole.model, text.model, *(chunk.model for chunk in streamed)} == {"tiny"}


def test_an_unknown_model_is_a_not_found_error_that_lists_the_known_ones(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="huge", messages=HELLO)
    assert refused.value.code == "model_not_found"
    assert refused.value.param == "model"
    assert "tiny-b" in refused.value.message


def test_text_completions_are_served_too(client: openai.OpenAI) -> None:
    assert client.completions.create(model="tiny", prompt="hello", max_tokens=4).choices[0].text


def test_answers_say_where_and_how_they_were_served(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=chat("tiny-b"), headers={"x-request-id": "mine-1"})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-node-id"] == "test-node"
    assert answer.headers["x-node-device"] == "cpu:0"
    assert int(answer.headers["x-node-load-ms"]) > 0
    assert "llama" not in answer.headers.get("server", "")
    assert "access-control-allow-origin" not in answer.headers


def test_a_stream_may_not_be_buffered_or_cached(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=chat("tiny", stream=True))
    assert answer.headers["x-accel-buffering"] == "no"
    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (b"", None),
        (b"{", None),
        (b"[]", None),
        (b"\xff\xfe{}", None),
        (b"{" + b'"a":[' * 100_000, None),
        (b'{"messages": []}', "model"),
        (b'{"model": 7, "messages": []}', "model"),
        (b'{"model": "", "messages": []}', "model"),
        (b'{"model": "tiny"}', "messages"),
        (b'{"model": "tiny", "messages": "hello"}', "messages"),
        (b'{"model": "tiny", "messages": [7]}', "messages"),
        (b'{"model": "tiny", "messages": [], "stream": "yes"}', "stream"),
    ],
)
def test_a_malformed_request_is_a_bad_request_that_names_the_field(
    http: httpx.Client, content: bytes, param: str | None
) -> None:
    answer = http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": "many"},
        {"temperature": "hot"},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "user", "content": 7}]},
        {"messages": [{"role": "user", "content": "x" * 100_000}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        {"n_predict": []},
    ],
)
def test_the_servers_own_errors_are_relayed_and_harm_nothing(
    agent: AgentProcess, http: httpx.Client, fields: dict[str, Any]
) -> None:
    assert http.post("/v1/chat/completions", json=chat("tiny")).status_code == 200
    child = agent.wait_child()
    answer = http.post("/v1/chat/completions", json=chat("tiny") | fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]
    assert http.post("/v1/chat/completions", json=chat("tiny")).status_code == 200
    assert agent.wait_child().pid == child.pid, "the server had to be restarted"


def test_unknown_paths_and_wrong_methods_answer_in_openais_shape(http: httpx.Client) -> None:
    for answer, status in ((http.get("/v1/nothing"), 404), (http.get("/v1/chat/completions"), 405)):
        assert answer.status_code == status
        assert answer.json()["error"]["message"].startswith(f"GET {'is' if status == 405 else repr('/v1/nothing')}")
        assert answer.headers["x-request-id"]
    assert answer.headers["allow"] == "OPTIONS, POST"


def test_a_compressed_body_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", content=b"zzz", headers={"content-encoding": "gzip"})
    assert answer.status_code == 415


def test_two_models_alternate_on_one_device_under_four_clients(agent: AgentProcess, http: httpx.Client) -> None:
    outcomes: Counter[int] = Counter()

    def one(number: int) -> None:
        with httpx.Client(base_url=agent.base_url, timeout=60, trust_env=False) as own:
            for turn in range(6):
                model = ("tiny", "tiny-b")[(number + turn) % 2]
                answer = own.post("/v1/chat/completions", json=chat(model, stream=bool(turn % 2)))
                outcomes[answer.status_code] += 1
                if answer.status_code == 200 and not turn % 2:
                    assert answer.json()["choices"][0]["message"]["content"]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(4)))
    assert outcomes == {200: 24}, outcomes
    lane = http.get("/v1/node/inventory").json()["devices"][0]["lane"]
    assert (lane["in_flight"], lane["waiting"]) == (0, 0)


def test_a_request_beyond_the_bound_is_refused_at_once_with_a_retry_after(
    agent: AgentProcess, client: openai.OpenAI
) -> None:
    started = threading.Barrier(9)

    def one(_number: int) -> httpx.Response:
        with httpx.Client(base_url=agent.base_url, timeout=60, trust_env=False) as own:
            started.wait()
            return own.post("/v1/chat/completions", json=chat("slow", 100))

    with ThreadPoolExecutor(8) as pool:
        waiting = [pool.submit(one, number) for number in range(8)]
        started.wait()
        answers = [future.result() for future in waiting]
    codes = Counter(answer.status_code for answer in answers)
    assert codes == {200: 4, 429: 4}, codes
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert float(refused.headers["retry-after-ms"]) >= 0
    assert refused.json()["error"]["code"] == "queue_full"


def test_the_openai_clients_rate_limit_error(agent: AgentProcess, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="slow", messages=HELLO, max_tokens=4000, stream=True)
    next(stream)
    with ThreadPoolExecutor(3) as pool, httpx.Client(base_url=agent.base_url, timeout=60, trust_env=False) as own:
        others = [pool.submit(own.post, "/v1/chat/completions", json=chat("slow", 1)) for _ in range(3)]
        wait_until(lambda: lane_of(agent)["free"] == 0, 10.0)
        with pytest.raises(openai.RateLimitError):
            client.chat.completions.create(model="slow", messages=HELLO)
        stream.close()
        assert [other.result().status_code for other in others] == [200] * 3


def lane_of(agent: AgentProcess) -> dict[str, int]:
    with httpx.Client(base_url=agent.base_url, timeout=30, trust_env=False) as own:
        lane: dict[str, int] = own.get("/v1/node/inventory").json()["devices"][0]["lane"]
        return lane


def test_a_client_that_leaves_a_stream_stops_the_generation(agent: AgentProcess, http: httpx.Client) -> None:
    with http.stream("POST", "/v1/chat/completions", json=chat("slow", 100_000, stream=True)) as answer:
        next(answer.iter_bytes())
        child = agent.wait_child()
    took_s = seconds_to_idle(child, 1.5)
    assert took_s is not None, "still generating after 1.5 s"
    wait_until(lambda: lane_of(agent)["in_flight"] == 0, 1.5)


def test_a_client_that_leaves_before_its_answer_stops_the_generation(agent: AgentProcess, http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json=chat("slow", 1))
    child = agent.wait_child()
    with pytest.raises(httpx.ReadTimeout):
        http.post("/v1/chat/completions", json=chat("slow", 100_000), timeout=0.5)
    took_s = seconds_to_idle(child, 3.0)
    assert took_s is not None, "still generating after 3 s"
    assert lane_of(agent)["in_flight"] == 0
    assert http.post("/v1/chat/completions", json=chat("slow", 1)).status_code == 200
    assert agent.wait_child().pid == child.pid


def test_health_paths(http: httpx.Client) -> None:
    assert http.get("/livez").status_code == 200
    assert http.get("/healthz").status_code == 200
    assert http.get("/health").json() == {"status": "ok"}
    ready = http.get("/readyz")
    assert (ready.status_code, ready.json()["status"]) == (200, "ready")


def test_the_inventory_lists_what_the_node_has(http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json=chat("tiny"))
    inventory = http.get("/v1/node/inventory").json()
    assert inventory["node_id"] == "test-node"
    assert inventory["status"] == "ready"
    [device] = inventory["devices"]
    assert device["device_id"] == "cpu:0"
    assert device["metrics"]["memory_total_bytes"] > 0
    [server] = device["servers"]
    assert (server["model_id"], server["state"]) == ("tiny", "ready")
    assert server["generation"] >= 1
    tiny = next(model for model in inventory["models"] if model["model_id"] == "tiny")
    assert tiny["aliases"] == ["small"]
    assert tiny["roles"] == ["planner"]
    assert tiny["loaded_on"] == ["cpu:0"]


def test_no_other_program_can_use_a_child(agent: AgentProcess, http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json=chat("tiny"))
    [address] = [
        connection.laddr for connection in agent.wait_child().net_connections("tcp") if connection.status == "LISTEN"
    ]
    assert address.ip == "127.0.0.1"
    with httpx.Client(base_url=f"http://127.0.0.1:{address.port}", trust_env=False) as stranger:
        assert stranger.post("/v1/chat/completions", json=chat("tiny")).status_code == 401
    assert not any("key" in argument for argument in agent.wait_child().cmdline())
