"""Mutated requests to the agent: each gets an answer or a closed connection, and nothing is left of it.

Each seed sends 40 requests; `FUZZ_REQUESTS=2000 pytest tests/endtoend/test_fuzz.py` sends more. A failure shows the
request, and the same seed sends the same ones.
"""

import json
import os
import random
import re
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

REQUESTS = int(os.environ.get("FUZZ_REQUESTS", "40"))
# For a machine with much else to do: an answer takes milliseconds.
ANSWERED_WITHIN_S = 30.0
STATUS = re.compile(rb"HTTP/1\.1 ([245]\d\d) |HTTP/1\.1 (100) ")
CHAT: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello there"}],
    "max_tokens": 2,
    "temperature": 0.5,
    "stop": ["x"],
}
ODD_VALUES: list[Any] = [
    *(None, True, False, "", "\x00", "\ud800", [], {}, [[]], [None], {"": {}}, "x" * 5000),
    *(0, -1, 1e308, -1e308, 2**31, 2**63, 2**64, 10**400, 0.1, float("nan"), float("inf")),
]
ODD_BODIES = [
    *(b"", b"null", b"[]", b"{", b'"', b"\xff\xfe", b"\x00" * 100, b"\xef\xbb\xbf{}", b"{}" * 10, b'{"model":"\xff"}'),
    *(b"[" * 100_000, b'{"messages":' * 20_000, b'{"messages":[' + b"{}," * 20_000 + b"{}]}", b"1" * 10_000),
    *(b'{"n":1e999999,"messages":[]}', b'{"messages":[{"role":"user","content":"\\ud800"}],"max_tokens":1}'),
]
ODD_LINES = [
    *(b"Content-Length: 5", b"Content-Length: -1", b"Content-Length: 99999999999999999999", b"Content-Length: 0x10"),
    *(b"Transfer-Encoding: chunked", b"Transfer-Encoding: gzip, chunked", b"Expect: 100-continue", b"Expect: x"),
    *(b"Connection: close", b"Connection: upgrade", b"Upgrade: h2c", b"Host: other", b"Host:", b": x", b" folded"),
    *(b"X-Request-Id: \xff", b"X-Priority: batch", b"Content-Encoding: br", b"Origin: null", b"X: " + b"x" * 40_000),
]

Mutation = Callable[[random.Random, bytes], bytes]


def post(body: bytes, path: str = "/v1/chat/completions") -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nHost: node\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def chunked(body: bytes) -> bytes:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: node\r\nTransfer-Encoding: chunked\r\n\r\n"
    pieces = [body[start : start + 50] for start in range(0, len(body), 50)]
    return head + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: node\r\nAccept: */*\r\n\r\n".encode()


BODY = json.dumps(CHAT).encode()
VALID = [
    post(BODY),
    post(json.dumps(CHAT | {"stream": True}).encode()),
    post(json.dumps({"prompt": "hello", "max_tokens": 2, "n": 2}).encode(), "/v1/completions"),
    chunked(BODY),
    *(get(path) for path in ("/v1/models", "/v1/models/tiny", "/readyz?drain=404", "/v1/node/queue")),
    post(b'{"device_id": "cpu:0"}', "/v1/node/models/tiny/load"),
]


def flip(choices: random.Random, request: bytes) -> bytes:
    changed = bytearray(request)
    for _ in range(choices.randint(1, 8)):
        changed[choices.randrange(len(changed))] = choices.randrange(256)
    return bytes(changed)


def truncate(choices: random.Random, request: bytes) -> bytes:
    return request[: choices.randrange(1, len(request))]


def insert(choices: random.Random, request: bytes) -> bytes:
    at = choices.randrange(len(request))
    return request[:at] + choices.choice([b"\r\n", b"\n", b"\x00", b"\r", b" ", choices.randbytes(20)]) + request[at:]


def change_a_line(choices: random.Random, request: bytes) -> bytes:
    """Double, remove or add a line of the head."""
    head, _, body = request.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    at = choices.randrange(len(lines))
    match choices.randrange(3):
        case 0:
            lines.insert(at, lines[at])
        case 1:
            del lines[at]
        case _:
            lines.insert(at + 1, choices.choice(ODD_LINES))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def many_lines(choices: random.Random, request: bytes) -> bytes:
    line, _, rest = request.partition(b"\r\n")
    return line + b"\r\n" + b"X-Many: x\r\n" * choices.choice([50, 99, 200, 5000]) + rest


def change_a_size(choices: random.Random, _request: bytes) -> bytes:
    """Of a chunk."""
    request = chunked(BODY)
    sizes = [it.span() for it in re.finditer(rb"(?<=\r\n)[0-9a-f]+(?=\r\n)", request)]
    start, end = choices.choice(sizes)
    odd = [b"0", b"-1", b"f" * 8, b"f" * 17, b"", b"5;x=y", b"5 ", b"0x5", b"g", b"1" * 5000]
    return request[:start] + choices.choice(odd) + request[end:]


def odd_body(choices: random.Random, _request: bytes) -> bytes:
    return choices.choice([post, chunked])(choices.choice(ODD_BODIES))


def odd_value(choices: random.Random, _request: bytes) -> bytes:
    """Somewhere in the JSON."""
    names = [*CHAT, "n", "stream", "top_k", "seed", "logit_bias", "tools", "response_format", "grammar", "prompt", "x"]
    body: dict[str, Any] = CHAT | {choices.choice(names): choices.choice(ODD_VALUES)}
    if choices.random() < 0.3:
        body["messages"] = [{"role": choices.choice(ODD_VALUES), "content": choices.choice(ODD_VALUES)}]
    return post(json.dumps(body).encode())


def twice(choices: random.Random, request: bytes) -> bytes:
    return request + flip(choices, choices.choice(VALID))


MUTATIONS: list[Mutation] = [
    *(flip, truncate, insert, change_a_line, many_lines, change_a_size, odd_body, odd_value, odd_value, twice)
]


@pytest.fixture(scope="module")
def agent(llama_server: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    # With a short context, so that a request that has lost its `max_tokens` ends soon too.
    models = [{"model_id": "tiny", "path": str(tiny_model), "ctx_size": 256}]
    with running_agent(write_config(tmp_path_factory.mktemp("agent"), llama_server, models)) as agent:
        answer = httpx.post(f"{agent.base_url}/v1/chat/completions", content=BODY, timeout=60, trust_env=False)
        assert answer.status_code == 200
        yield agent


def ask(agent: AgentProcess, choices: random.Random, request: bytes) -> str:
    """Send it, in one piece or in some; return the status of the first answer, or "closed" if there is none."""
    host, port = agent.base_url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=ANSWERED_WITHIN_S) as sock:
        try:
            cut = choices.randrange(len(request)) if choices.random() < 0.3 else 0
            for piece in (request[:cut], request[cut:]):
                sock.sendall(piece)
            # Otherwise the node would wait for the rest of a request that is truncated, as it should.
            sock.shutdown(socket.SHUT_WR)
            while data := sock.recv(2**16):
                received += data
        except (ConnectionResetError, BrokenPipeError):
            pass
        except TimeoutError:
            raise AssertionError(f"no end after {ANSWERED_WITHIN_S} s: {request[:3000]!r}, {received!r}") from None
    if not received:
        return "closed"
    status = STATUS.match(received)
    assert status is not None, f"{request[:3000]!r} was answered by {received[:1000]!r}"
    return (status[1] or status[2]).decode()


def left(agent: AgentProcess) -> list[Any]:
    """What is there of requests and of their connections."""
    with httpx.Client(base_url=agent.base_url, timeout=30, trust_env=False) as http:
        tickets = http.get("/v1/node/queue").json()["lanes"][0]["tickets"]
        lane = http.get("/v1/node/inventory").json()["devices"][0]["lane"]
    port = int(agent.base_url.rpartition(":")[2])
    connections = psutil.Process(agent.process.pid).net_connections("tcp")
    ours = [it for it in connections if it.laddr.port == port and it.status != psutil.CONN_LISTEN]
    return [it for it in (tickets, lane["in_flight"], ours) if it]


@pytest.mark.parametrize("seed", range(5))
def test_a_mutated_request_gets_an_answer_or_a_closed_connection_and_nothing_is_left_of_it(
    seed: int, agent: AgentProcess, record_property: Callable[[str, object], None]
) -> None:
    choices = random.Random(seed)
    already_told = len(agent.lines)
    statuses: Counter[str] = Counter()
    for _ in range(REQUESTS):
        statuses[ask(agent, choices, choices.choice(MUTATIONS)(choices, choices.choice(VALID)))] += 1
    record_property("statuses", dict(statuses))
    print(sorted(statuses.items()))
    assert httpx.get(f"{agent.base_url}/livez", timeout=30, trust_env=False).status_code == 200
    until = time.monotonic() + ANSWERED_WITHIN_S
    while found := left(agent):
        assert time.monotonic() < until, found
        time.sleep(0.1)
    # A server logs bad values as errors of its own.
    told = [line for line in agent.lines[already_told:] if line.get("logger") != "nodeagent.child"]
    faults = [line for line in told if "Traceback" in str(line) or line.get("level") in ("error", "critical")]
    assert faults == [], "\n".join(map(str, faults))
