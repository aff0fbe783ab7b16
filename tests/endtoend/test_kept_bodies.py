"""The bodies in the activity: the agent as a process, the real llama-server."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

WORDS = "zebras-in-confidence"
KEY = "the-secret-key-of-carol"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": WORDS}], "max_tokens": 4}


def written(folder: Path, llama_server: Path, model: Path, **activity: Any) -> Path:
    return write_config(
        folder,
        llama_server,
        [{"model_id": "tiny", "path": str(model), "defaults": {"temperature": 0.25}}],
        api_keys=[{"name": "carol", "env": "CAROLS_KEY"}],
        activity={"path": str(folder / "activity.sqlite"), **activity},
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bodies")


@pytest.fixture(scope="module")
def agent(folder: Path, llama_server: Path, tiny_model: Path) -> Iterator[AgentProcess]:
    config = written(folder, llama_server, tiny_model, bodies=True, max_body_bytes=1000)
    with running_agent(config, CAROLS_KEY=KEY) as agent:
        yield agent


@contextmanager
def client_of(agent: AgentProcess) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=agent.base_url, headers=headers, trust_env=False, timeout=60) as client:
        yield client


def get(agent: AgentProcess, path: str, status: int = 200) -> httpx.Response:
    answer = httpx.get(agent.base_url + path, headers=agent.operator_headers(), trust_env=False, timeout=30)
    assert answer.status_code == status
    return answer


def newest(agent: AgentProcess) -> dict[str, Any]:
    [line] = get(agent, "/v1/node/activity?limit=1").json()["activity"]
    record: dict[str, Any] = get(agent, f"/v1/node/activity/{line['id']}").json()
    return record


def run(folder: Path, *argv: str) -> str:
    command = [sys.executable, "-m", "nodeagent", *argv, "--config", str(folder / "node_agent.yaml")]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


def test_a_request_is_kept_as_its_server_got_it_and_its_answer_as_its_client_did(
    agent: AgentProcess, folder: Path
) -> None:
    with client_of(agent) as client:
        answer = client.post("/v1/chat/completions", json=ASKED)
    record = newest(agent)
    assert json.loads(record["request_body"]["text"]) == ASKED | {"temperature": 0.25}
    text = answer.text[:1000]
    assert (record["answer_body"]["text"], record["answer_body"]["bytes"]) == (text, len(answer.content))
    assert record["answer_body"]["cut"] is (len(answer.content) > 1000)
    assert KEY not in json.dumps(record)
    shown = run(folder, "activity", "--id", str(record["id"]))
    assert WORDS in shown
    assert "Answer (application/json, " in shown


def test_a_stream_is_kept_as_it_was_sent_up_to_its_bound(agent: AgentProcess) -> None:
    with client_of(agent) as client:
        answer = client.post("/v1/chat/completions", json=ASKED | {"stream": True, "max_tokens": 20})
    body = newest(agent)["answer_body"]
    assert body == {
        "type": "text/event-stream",
        "bytes": len(answer.content),
        "cut": True,
        "text": answer.content[:1000].decode(errors="ignore"),
    }


def test_an_answer_to_a_client_of_ollama_is_kept_as_it_got_it(agent: AgentProcess) -> None:
    with client_of(agent) as client:
        answer = client.post("/api/generate", json={"model": "tiny", "prompt": WORDS, "options": {"num_predict": 2}})
    record = newest(agent)
    assert record["path"] == "/api/generate"
    assert record["answer_body"]["text"] == answer.text[:1000]
    assert WORDS in record["request_body"]["text"]


def test_a_form_with_a_sound_is_its_type_and_size(agent: AgentProcess) -> None:
    with client_of(agent) as client:
        client.post("/v1/audio/transcriptions", data={"model": "tiny"}, files={"file": ("a.wav", bytes(5000))})
    body = newest(agent)["request_body"]
    assert (body["type"], body["text"], body["cut"]) == ("multipart/form-data", None, False)
    assert body["bytes"] > 5000


def test_bodies_are_for_operators_only_and_in_nothing_else_that_the_node_shows_or_writes(
    agent: AgentProcess, folder: Path
) -> None:
    with client_of(agent) as client:
        client.post("/v1/chat/completions", json=ASKED)
        number = newest(agent)["id"]
        assert client.get(f"/v1/node/activity/{number}").status_code == 403
    page = httpx.get(
        f"{agent.base_url}/v1/node/activity/{number}",
        headers=agent.operator_headers() | {"Origin": "http://evil.example"},
        trust_env=False,
    )
    assert page.json()["error"]["code"] == "origin_forbidden"
    shown = [
        get(agent, path).text
        for path in (
            "/v1/node/activity",
            "/v1/node/events?follow=false",
            "/v1/node/inventory",
            "/v1/node/queue",
            "/v1/node/requests",
            "/v1/node/keys",
            "/v1/node/devices/cpu:0/logs",
            "/metrics",
        )
    ]
    shown += [json.dumps(line) for line in agent.lines]
    shown += [file.read_bytes().decode("latin-1") for file in folder.rglob("*") if file.is_file()]
    assert len(shown) > 20
    assert [text[:200] for text in shown if WORDS in text] == []
    assert get(agent, "/v1/node/activity").json()["activity"][0]["has_bodies"] is True


def test_no_such_record_is_an_error_with_a_code(agent: AgentProcess) -> None:
    assert get(agent, "/v1/node/activity/99999", status=404).json()["error"]["code"] == "record_not_found"
    get(agent, f"/v1/node/activity/{'9' * 5000}", status=404)


def test_the_agent_warns_that_it_keeps_them_and_a_reload_turns_that_off_and_on(
    agent: AgentProcess, folder: Path, llama_server: Path, tiny_model: Path
) -> None:
    warnings = [line["message"] for line in agent.lines if line.get("level") == "warning"]
    assert [text for text in warnings if "the bodies of requests and answers are kept in memory" in text]
    with client_of(agent) as client:
        client.post("/v1/chat/completions", json=ASKED)
        before = newest(agent)
        assert before["request_body"] is not None
        written(folder, llama_server, tiny_model)
        run(folder, "reload")
        assert get(agent, f"/v1/node/activity/{before['id']}").json()["request_body"] is None
        client.post("/v1/chat/completions", json=ASKED)
        assert newest(agent)["answer_body"] is None
        written(folder, llama_server, tiny_model, bodies=True, max_body_bytes=50)
        run(folder, "reload")
        client.post("/v1/chat/completions", json=ASKED)
        assert newest(agent)["answer_body"]["cut"] is True
