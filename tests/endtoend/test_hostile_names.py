"""Names that a client makes up to forge lines of the log, headers of an answer, or what a terminal shows.

The agent is a process, the llama-server the real one; the requests are bytes.
"""

import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config
from nodeagent.config.api_keys import digest_of
from nodeagent.front.endpoints import ENDPOINTS

KEY = "a-key-of-the-test"
# A line break, a head of an answer, a clear screen in both ways to write it, text from right to left, a bell, quotes.
HOSTILE = '\r\n\r\nX-Evil: 1\n{"level":"error","message":"forged"}\x1b[2J\x9b31m\u202egnp\u2066\u200f\x07\x00"\'<b>'
AS_HEADER = b"x\x1b[2J\x9b31m\xe2\x80\xae\x07\"'"
UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture(scope="module")
def config(llama_server: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys: Any = {"api_keys": [{"name": "alice", "sha256": digest_of(KEY), "roles": ["inference", "admin"]}]}
    models = [{"model_id": "tiny", "path": str(tiny_model), "aliases": ["small"]}]
    return write_config(tmp_path_factory.mktemp("agent"), llama_server, models, **keys)


@pytest.fixture(scope="module")
def agent(config: Path) -> Iterator[AgentProcess]:
    with running_agent(config) as agent:
        yield agent


def ask(
    agent: AgentProcess, target: str, body: bytes = b"", method: str = "", headers: dict[str, bytes] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """The status, the headers and the body of the answer, in which nothing may be forged."""
    host, port = agent.base_url.removeprefix("http://").split(":")
    fields = {"Host": b"n", "Authorization": f"Bearer {KEY}".encode(), **(headers or {})}
    fields["Content-Length"] = b"%d" % len(body)
    # 1.0, so that a body that is relayed is not chunked.
    lines = [f"{method or ('POST' if body else 'GET')} {target} HTTP/1.0".encode()]
    lines += [name.encode() + b": " + value for name, value in fields.items()]
    with socket.create_connection((host, int(port)), timeout=60) as client:
        client.sendall(b"\r\n".join([*lines, b"", body]))
        answer = b""
        while data := client.recv(65536):
            answer += data
    head, _, content = answer.partition(b"\r\n\r\n")
    status, *rest = head.decode("ascii").split("\r\n")
    got = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
    assert "x-evil" not in got
    assert not UNPRINTABLE.search(head.decode("ascii").replace("\r\n", "\n"))
    assert "x-request-id" not in got or re.fullmatch("[A-Za-z0-9._:-]{1,128}", got["x-request-id"])
    return int(status.split()[1]), got, content


def assert_an_error(answer: tuple[int, dict[str, str], bytes], *statuses: int) -> None:
    status, headers, content = answer
    assert status in statuses, content
    assert headers["content-type"].startswith("application/json")
    error = json.loads(content)["error"]
    message = error if isinstance(error, str) else error["message"]
    assert not UNPRINTABLE.search(message.replace("\n", ""))
    assert len(message) < 1000


@pytest.mark.parametrize("path", [path for path, endpoint in ENDPOINTS.items() if not endpoint.is_form])
def test_the_name_of_a_model_in_a_body(agent: AgentProcess, path: str) -> None:
    needs = {
        "messages": [{"role": "user", "content": "x"}],
        **dict.fromkeys(("prompt", "input", "content", "query", "input_prefix"), "x"),
        "tokens": [1],
        "documents": ["x"],
    }
    assert_an_error(ask(agent, path, json.dumps({"model": HOSTILE, **needs}).encode()), 404)


def test_the_name_of_a_model_in_a_form(agent: AgentProcess) -> None:
    form = b'--b\r\nContent-Disposition: form-data; name="file"; filename="%s"\r\n\r\nRIFF\r\n' % AS_HEADER
    form += b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%s\r\n--b--\r\n' % HOSTILE.encode()
    headers = {"Content-Type": b"multipart/form-data; boundary=b"}
    assert_an_error(ask(agent, "/v1/audio/transcriptions", form, headers=headers), 400, 404)


@pytest.mark.parametrize(
    ("method", "target"),
    [
        ("GET", "/{}"),
        ("GET", "/v1/models/{}"),
        ("GET", "/slots?model={}"),
        ("GET", "/props?model={}"),
        ("GET", "/page/{}"),
        ("POST", "/api/{}"),
        ("GET", "/v1/node/devices/{}/logs"),
        ("GET", "/v1/node/devices/cpu:0/logs?lines={}"),
        ("GET", "/v1/node/events?follow=false&after={}"),
        ("GET", "/v1/node/activity?limit={}"),
        ("POST", "/v1/node/models/{}/load"),
        ("POST", "/v1/node/models/{}/unload"),
        ("POST", "/v1/node/models/{}/restart"),
        ("DELETE", "/v1/node/requests/{}"),
        ("GET", "/upstream/{}/props"),
        ("GET", "/upstream/tiny/{}"),
        ("PUT", "/v1/chat/completions/{}"),
    ],
)
def test_a_name_in_a_path_or_a_query(agent: AgentProcess, method: str, target: str) -> None:
    for name in (quote(HOSTILE, safe=""), quote(AS_HEADER), quote(HOSTILE.replace("\0", ""), safe="")):
        body = b"{}" if method == "POST" else b""
        answer = ask(agent, target.format(name), body, method)
        assert_an_error(answer, 400, 403, 404, 405)


def test_a_device_in_a_body_and_filters_that_nothing_fits(agent: AgentProcess) -> None:
    body = json.dumps({"device_id": HOSTILE}).encode()
    assert_an_error(ask(agent, "/v1/node/models/tiny/load", body), 404)
    for query in ("key", "model", "error", "device"):
        status, _, content = ask(agent, f"/v1/node/activity?{query}={quote(HOSTILE, safe='')}")
        assert status in (200, 400)
        assert HOSTILE.encode() not in content


@pytest.mark.parametrize(
    "name",
    [
        *("User-Agent", "X-Request-Id", "X-Session-Id", "X-Priority", "Authorization", "X-Api-Key", "Origin", "Accept"),
        *("Content-Type", "Content-Encoding", "Last-Event-ID", "Traceparent", "Tracestate", "Referer", "Cookie"),
        *("Sec-Fetch-Site", "Access-Control-Request-Headers", "If-None-Match", "Forwarded", "X-Forwarded-For"),
    ],
)
def test_a_header(agent: AgentProcess, name: str) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
    # Of these bytes the parser lets some through, so each kind goes by itself too.
    for value in (AS_HEADER, b"x\x9b31m\xe2\x80\xae\"'", b"x\x1b[2J", b"a b", b"x" * 5000, HOSTILE[9:].encode()):
        headers = {name: value.replace(b"\n", b"").replace(b"\0", b"")}
        for target, content in (
            ("/v1/chat/completions", json.dumps(body).encode()),
            ("/v1/models", b""),
            ("/v1/node/events?follow=false", b""),
            ("/livez", b""),
        ):
            status, got, said = ask(agent, target, content, headers=headers)
            assert status < 500, said
            if status >= 400:
                assert_an_error((status, got, said), status)


def test_what_a_person_is_shown_of_all_that_is_printable(agent: AgentProcess, config: Path) -> None:
    with httpx.Client(base_url=agent.base_url, headers={"Authorization": f"Bearer {KEY}"}, trust_env=False) as http:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
        headers = {b"User-Agent": b"x\x9b31m\xe2\x80\xae", b"X-Session-Id": b"x\x9b31m\xe2\x80\xae"}
        assert http.post("/v1/chat/completions", json=body, headers=headers, timeout=60).status_code == 200
        unknown = http.post("/v1/chat/completions", json=body | {"model": HOSTILE}, headers=headers, timeout=60)
        assert unknown.status_code == 404
        metrics = http.get("/metrics").text
        activity = http.get("/v1/node/activity").json()["activity"]
    assert "forged" not in metrics
    assert len(activity) >= 2
    assert not UNPRINTABLE.search("".join(record["user_agent"] or "" for record in activity))
    for command in (("activity",), ("events", "--no-follow"), ("status",), ("logs", "cpu:0", "--no-follow")):
        argv = [sys.executable, "-m", "nodeagent", *command, "--config", str(config)]
        shown = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
        assert shown.returncode == 0, shown.stderr
        assert not UNPRINTABLE.search(shown.stdout + shown.stderr)


def test_each_line_of_the_log_is_the_nodes_own(agent: AgentProcess) -> None:
    agent.wait_for_line(lambda line: "GET" in line["message"] or "tiny" in line["message"])
    forged = [line for line in agent.lines if "level" not in line or line["message"] == "forged"]
    assert forged == [], "no JSON, or another's"
