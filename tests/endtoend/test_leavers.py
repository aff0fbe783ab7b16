"""Clients that leave in the middle of a generation, as themselves and behind proxies: the generation stops."""

import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.agent_process import AgentProcess, running_agent, seconds_to_idle, write_config
from fakes.waiting import wait_until

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "haproxy" / "haproxy.cfg"
LONG: dict[str, Any] = {
    "model": "slow",
    "messages": [{"role": "user", "content": "hello there"}],
    "max_tokens": 100_000,
}
# The aims are a second for a stream, and 1.5 s for a request that is not streamed; the rest is for a busy machine. A
# generation that is not stopped takes more than ten seconds on any.
STREAM_S = 3.0
WHOLE_S = 3.5

HTTPX = """
import httpx, sys
url = sys.argv[1] + "/v1/chat/completions"
with httpx.stream("POST", url, content=sys.argv[2], timeout=120, trust_env=False) as it:
    for piece in it.iter_raw():
        print(piece, flush=True)
"""
OPENAI = """
import json, openai, sys
body = json.loads(sys.argv[2])
answer = openai.OpenAI(base_url=sys.argv[1] + "/v1", api_key="none", max_retries=0).chat.completions.create(**body)
for piece in answer:
    print(piece, flush=True)
"""


def curl(url: str, body: str) -> list[str]:
    return [program("curl"), "-sN", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json", "-d", body]


CLIENTS: dict[str, Callable[[str, str], list[str]]] = {
    "curl": curl,
    "httpx": lambda url, body: [sys.executable, "-c", HTTPX, url, body],
    "openai": lambda url, body: [sys.executable, "-c", OPENAI, url, body],
}


def program(name: str) -> str:
    found = shutil.which(name, path="/usr/sbin:/usr/bin:/sbin:/bin")
    assert found is not None, f"{name} is missing: install its package"
    return found


@pytest.fixture(scope="module")
def agent(llama_server: Path, slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    models = [{"model_id": "slow", "path": str(slow_model), "threads": 1}]
    with running_agent(write_config(tmp_path_factory.mktemp("agent"), llama_server, models)) as agent:
        yield agent


@contextmanager
def behind(proxy: str, agent: AgentProcess, folder: Path) -> Iterator[str]:
    """The URL at which clients of this proxy reach the agent."""
    if proxy == "direct":
        yield agent.base_url
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = (haproxy if proxy == "haproxy" else nginx)(folder, port, agent.base_url.removeprefix("http://"))
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: accepts(port))
            yield f"http://127.0.0.1:{port}"
        finally:
            process.kill()


def haproxy(folder: Path, port: int, upstream: str) -> list[str]:
    """The example's configuration, with one node."""
    text = EXAMPLE.read_text(encoding="utf-8").replace(":8080", f":{port}").replace("127.0.0.1:8081", upstream)
    file = folder / "haproxy.cfg"
    file.write_text(re.sub(r"^ *server box-b .*\n", "", text, flags=re.MULTILINE), encoding="utf-8")
    return [program("haproxy"), "-db", "-f", str(file)]


def nginx(folder: Path, port: int, upstream: str) -> list[str]:
    """As it is by default, but with its files in this folder."""
    paths = "".join(f"  {it}_temp_path {folder};\n" for it in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    file = folder / "nginx.conf"
    file.write_text(
        f"daemon off;\nmaster_process off;\npid {folder}/pid;\nevents {{}}\nhttp {{\n  access_log off;\n{paths}"
        f"  server {{\n    listen 127.0.0.1:{port};\n    location / {{ proxy_pass http://{upstream}; }}\n  }}\n}}\n"
    )
    return [program("nginx"), "-e", "stderr", "-p", str(folder), "-c", str(file)]


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except ConnectionRefusedError:
        return False
    return True


def in_flight(agent: AgentProcess) -> int:
    inventory = httpx.get(f"{agent.base_url}/v1/node/inventory", timeout=30, trust_env=False).json()
    count: int = inventory["devices"][0]["lane"]["in_flight"]
    return count


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
@pytest.mark.parametrize(
    ("client", "proxy"),
    [("curl", "direct"), ("httpx", "direct"), ("openai", "direct"), ("curl", "nginx"), ("curl", "haproxy")],
)
def test_a_client_that_is_killed_stops_its_generation(
    client: str, proxy: str, stream: bool, agent: AgentProcess, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        url = stack.enter_context(behind(proxy, agent, tmp_path))
        argv = CLIENTS[client](url, json.dumps(LONG | {"stream": stream}))
        with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
            try:
                if stream:
                    assert process.stdout is not None
                    assert process.stdout.readline()
                wait_until(lambda: in_flight(agent) == 1)
                child = agent.wait_child()
                time.sleep(0.3)  # well into the generation
                assert in_flight(agent) == 1
            finally:
                process.kill()
        within_s = STREAM_S if stream else WHOLE_S
        wait_until(lambda: in_flight(agent) == 0, within_s)
        assert seconds_to_idle(child, within_s) is not None, f"still generating after {within_s} s"
        assert agent.wait_child().pid == child.pid


def test_netcat_gets_the_answers_for_which_it_only_waits(agent: AgentProcess) -> None:
    body = json.dumps(LONG | {"max_tokens": 1})
    assert (
        httpx.post(f"{agent.base_url}/v1/chat/completions", content=body, timeout=60, trust_env=False).status_code
        == 200
    )
    post = f"POST /v1/chat/completions HTTP/1.1\r\nHost: n\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    host, port = agent.base_url.removeprefix("http://").split(":")
    for request, part in (("GET /livez HTTP/1.1\r\nHost: n\r\n\r\n", b'"ok"'), (post, b'"choices"')):
        done = subprocess.run(
            [program("nc"), "-N", host, port], input=request.encode(), capture_output=True, timeout=60
        )
        assert done.stdout.startswith(b"HTTP/1.1 200")
        assert part in done.stdout
