"""Requests that are unusual but right, to the agent as a process and the real llama-server."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}
MIB = 2**20


@pytest.fixture(scope="module")
def agent(llama_server: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    """One model, `parallel: 2`."""
    models = [{"model_id": "tiny", "path": str(tiny_model), "parallel": 2}]
    with running_agent(write_config(tmp_path_factory.mktemp("agent"), llama_server, models)) as agent:
        yield agent


@pytest.fixture
def http(agent: AgentProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=agent.base_url, timeout=30, trust_env=False) as http:
        yield http


@pytest.mark.parametrize("content_type", ["multipart/form-data; boundary=x", "text/plain", "application/json"])
def test_a_request_without_a_model_and_with_a_byte_order_mark_is_answered_whatever_its_type(
    http: httpx.Client, content_type: str
) -> None:
    content = b"\xef\xbb\xbf" + json.dumps(CHAT).encode()
    answer = http.post("/v1/chat/completions", content=content, headers={"content-type": content_type})
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "tiny"


def test_paths_work_as_clients_spell_them(http: httpx.Client) -> None:
    for path in ("/chat/completions", "/v1/chat/completions/", "/v1//chat/completions"):
        answer = http.post(path, json=CHAT)
        assert (answer.status_code, answer.json()["object"]) == (200, "chat.completion")
    assert http.post("/completions", json={"prompt": "hello", "max_tokens": 2}).json()["object"] == "text_completion"
    for path in ("/models", "/v1/models/", "/v1//models"):
        assert [model["id"] for model in http.get(path).json()["data"]] == ["tiny"]
    assert http.get("/models/tiny/").json()["id"] == "tiny"
    options = http.options("/chat/completions")
    assert (options.status_code, options.headers["allow"]) == (204, "OPTIONS, POST")


def test_several_completions_are_answered_together(http: httpx.Client) -> None:
    answer = http.post("/v1/chat/completions", json=CHAT | {"n": 2})
    assert answer.status_code == 200, answer.text
    assert len(answer.json()["choices"]) == 2


def test_a_large_body_of_tiny_objects_takes_little_memory_and_health_checks_stay_quick(
    agent: AgentProcess, http: httpx.Client
) -> None:
    body = b'{"model":"huge","messages":[' + b"{}," * (20 * MIB // 3) + b"{}]}"
    process = psutil.Process(agent.process.pid)
    before = process.memory_info().rss
    peaks, took_s, over = [before], [0.0], threading.Event()

    def watch() -> None:
        with httpx.Client(base_url=agent.base_url, timeout=30, trust_env=False) as own:
            while not over.is_set():
                began = time.monotonic()
                assert own.get("/livez").status_code == 200
                took_s.append(time.monotonic() - began)
                peaks.append(process.memory_info().rss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    answer = http.post("/v1/chat/completions", content=body)
    over.set()
    watcher.join()
    assert answer.status_code == 404, answer.text[:300]
    print(f"memory +{(max(peaks) - before) / MIB:.0f} MiB, slowest /livez {max(took_s):.3f} s")
    assert max(peaks) - before < 120 * MIB
    assert max(took_s) < 1.0
