"""Streams that wait, for a slow load or behind another request, with the real llama-server and OpenAI's client."""

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def agent(
    llama_server: Path, tiny_model: Path, slow_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentProcess]:
    """A model that loads slowly (the server sleeps before it starts), and one that generates slowly, with one slot and
    with two."""
    folder = tmp_path_factory.mktemp("agent")
    wrapper = folder / "server"
    wrapper.write_text(f'#!/bin/sh\ncase " $* " in *" -a tiny "*) sleep 2;; esac\nexec {llama_server} "$@"\n')
    wrapper.chmod(0o755)
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model)},
        {"model_id": "slow", "path": str(slow_model), "threads": 1},
        {"model_id": "wide", "path": str(slow_model), "threads": 1, "parallel": 2},
    ]
    keys = {"stream_ping_s": 0.3, "max_pending_requests_per_device": 4}
    with running_agent(write_config(folder, wrapper, models, **keys)) as agent:
        yield agent


@pytest.fixture
def http(agent: AgentProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=agent.base_url, timeout=60, trust_env=False) as http:
        yield http


def chat(model: str, **more: Any) -> dict[str, Any]:
    return {"model": model, "messages": HELLO, "max_tokens": 8, "stream": True, **more}


def test_a_stream_says_that_its_model_loads_and_openais_client_reads_over_it(
    agent: AgentProcess, http: httpx.Client
) -> None:
    answer = http.post("/v1/chat/completions", json=chat("tiny"))
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["x-node-id"] == "test-node"
    assert answer.text.startswith(": loading tiny\n\n: loading tiny\n\n")
    assert answer.text.endswith("data: [DONE]\n\n")
    http.post("/v1/chat/completions", json=chat("slow"))  # which unloads it
    with openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8, stream=True)
        assert stream.response.headers["content-type"] == "text/event-stream"
        assert "x-node-device" not in stream.response.headers, "the head did not go out early"
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)


@contextmanager
def generating(agent: AgentProcess, body: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """A stream that generates on and on, until what is given is called or the block ends."""
    busy, over = threading.Event(), threading.Event()

    def generate() -> None:
        with (
            httpx.Client(base_url=agent.base_url, timeout=60, trust_env=False) as own,
            own.stream("POST", "/v1/chat/completions", json=body | {"max_tokens": 100_000}) as answer,
        ):
            lines = answer.iter_lines()  # kept, since its end would close the answer
            assert next(line for line in lines if line.startswith("data: "))
            busy.set()
            over.wait(60)

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        assert busy.wait(60)
        yield over.set
    finally:
        over.set()
        thread.join()


def test_a_stream_behind_another_says_its_place_and_one_that_leaves_gives_it_up(
    agent: AgentProcess, http: httpx.Client
) -> None:
    with generating(agent, chat("slow")) as end:
        with http.stream("POST", "/v1/chat/completions", json=chat("slow")) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": waiting: place 1 in the queue"
            assert waiting(http) == 1
        until = time.monotonic() + 10
        while waiting(http) and time.monotonic() < until:
            time.sleep(0.02)
        assert waiting(http) == 0
        with http.stream("POST", "/v1/chat/completions", json=chat("slow")) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": waiting: place 1 in the queue"
            end()
            assert "data: [DONE]" in list(lines)


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"n": 2}),
        ("/v1/completions", {"n": 2, "prompt": "hello"}),
        ("/v1/completions", {"prompt": ["hello", "there"]}),
    ],
)
def test_several_completions_need_as_many_slots_streamed_and_not(
    agent: AgentProcess, http: httpx.Client, path: str, fields: dict[str, Any]
) -> None:
    body = chat("wide", **fields)
    with generating(agent, chat("wide")) as end:
        # One of the two slots is free: enough for one completion, but not for two.
        assert http.post("/v1/chat/completions", json=chat("wide", stream=False)).status_code == 200
        with http.stream("POST", path, json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": waiting: place 1 in the queue"
            end()
            events = [json.loads(line[len("data: ") :]) for line in lines if line.startswith("data: {")]
    assert {choice["index"] for event in events for choice in event["choices"]} == {0, 1}
    whole = http.post(path, json=body | {"stream": False}).json()
    assert sorted(choice["index"] for choice in whole["choices"]) == [0, 1]
    assert whole["model"] == "wide"


def test_what_the_server_refuses_after_comments_is_an_api_error(agent: AgentProcess, http: httpx.Client) -> None:
    http.post("/v1/chat/completions", json=chat("slow", max_tokens=1))
    bad = {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}
    with http.stream("POST", "/v1/chat/completions", json=chat("tiny", response_format=bad)) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        event = next(line for line in lines if line.startswith("data: "))
        with pytest.raises(httpx.RemoteProtocolError):
            list(lines)
    content = json.loads(event.removeprefix("data: "))
    assert content["error"]["message"]
    assert content["request_id"] == answer.headers["x-request-id"]
    http.post("/v1/chat/completions", json=chat("slow", max_tokens=1))
    with openai.OpenAI(base_url=f"{agent.base_url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        stream = client.chat.completions.create(
            model="tiny",
            messages=HELLO,
            stream=True,
            response_format=bad,  # type: ignore[call-overload]
        )
        with pytest.raises(openai.APIError, match=r"\w"):
            list(stream)


def test_a_proxy_that_cuts_silent_answers_passes_on_a_stream_that_waits(
    agent: AgentProcess, http: httpx.Client, tmp_path: Path
) -> None:
    with nginx(tmp_path, agent.base_url, read_timeout_s=1) as url:
        for streams, status in ((True, 200), (False, 504)):
            http.post("/v1/chat/completions", json=chat("slow", max_tokens=1))  # which unloads the other one
            answer = httpx.post(url, json=chat("tiny", stream=streams), timeout=60, trust_env=False)
            assert answer.status_code == status
            assert ("data: [DONE]" in answer.text) == streams


@contextmanager
def nginx(folder: Path, upstream: str, *, read_timeout_s: int) -> Iterator[str]:
    """A real nginx in front of the agent; the URL of its chats."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    file = folder / "nginx.conf"
    file.write_text(f"""
        daemon off; master_process off; pid {folder}/pid; error_log stderr;
        events {{}}
        http {{
            access_log off; client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
            fastcgi_temp_path {folder}/f; uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
            server {{
                listen 127.0.0.1:{port};
                location / {{ proxy_pass {upstream}; proxy_http_version 1.1; proxy_read_timeout {read_timeout_s}s; }}
            }}
        }}""")
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert program is not None, "nginx is missing: install its package"
    with subprocess.Popen([program, "-c", str(file), "-p", str(folder)], stderr=subprocess.DEVNULL) as process:
        try:
            until = time.monotonic() + 10
            while True:
                try:
                    socket.create_connection(("127.0.0.1", port), timeout=1).close()
                    break
                except ConnectionRefusedError:
                    assert time.monotonic() < until, "nginx does not listen"
                    time.sleep(0.02)
            yield f"http://127.0.0.1:{port}/v1/chat/completions"
        finally:
            process.kill()


def waiting(http: httpx.Client) -> int:
    return int(http.get("/v1/node/inventory").json()["devices"][0]["lane"]["waiting"])
