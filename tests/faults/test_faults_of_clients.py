"""Clients that don't read what they asked for, many at once."""

import json
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import psutil

from fakes.agent_process import AgentProcess, running_agent, write_config
from fakes.waiting import wait_until

FAKE = Path(__file__).parent.parent / "fakes" / "faulty_server.py"
SLOTS = 64
STUCK = 50
# The relay reads 64 KiB at a time, and the front keeps what it could not write of that.
RSS_MAX_BYTES = 48 * 2**20


def chat(events: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": "hello"}]
    return {"model": "m", "messages": messages, "max_tokens": events, "stream": True}


def streamed(agent: AgentProcess, events: int) -> int:
    """Read a whole stream; return how many events came."""
    answer = httpx.post(f"{agent.base_url}/v1/chat/completions", json=chat(events), timeout=60, trust_env=False)
    assert answer.text.endswith("data: [DONE]\n\n")
    return answer.text.count("data: ")


def in_flight(agent: AgentProcess) -> int:
    inventory = httpx.get(f"{agent.base_url}/v1/node/inventory", timeout=30, trust_env=False).json()
    count: int = inventory["devices"][0]["lane"]["in_flight"]
    return count


def ask_without_reading(agent: AgentProcess) -> socket.socket:
    host, port = agent.base_url.removeprefix("http://").split(":")
    body = json.dumps(chat(10**6)).encode()
    client = socket.create_connection((host, int(port)))
    client.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: n\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    return client


def test_clients_that_do_not_read_cost_little_memory_delay_no_other_and_free_their_slots_when_they_leave(
    tiny_model: Path, tmp_path: Path, show: Callable[[str], None]
) -> None:
    server = tmp_path / "server"
    server.write_text(f'#!/bin/sh\nexec {FAKE} torrent "$@"\n')
    server.chmod(0o755)
    models = [{"model_id": "m", "path": str(tiny_model), "parallel": SLOTS}]
    with running_agent(write_config(tmp_path, server, models, max_pending_requests_per_device=SLOTS)) as agent:
        process = psutil.Process(agent.process.pid)
        assert streamed(agent, 100) == 101
        before = process.memory_info().rss
        with ExitStack() as stack:
            for _ in range(STUCK):
                stack.enter_context(ask_without_reading(agent))
            wait_until(lambda: in_flight(agent) == STUCK, 20)
            with ThreadPoolExecutor(10) as pool:
                began = time.monotonic()
                assert list(pool.map(lambda _: streamed(agent, 1000), range(10))) == [1001] * 10
                took_s = time.monotonic() - began
            assert in_flight(agent) == STUCK
            grown = process.memory_info().rss - before
        show(
            f"{STUCK} clients that don't read: {grown / 2**20:.0f} MiB; ten streams of 4 MB beside them: {took_s:.1f} s"
        )
        assert grown < RSS_MAX_BYTES
        wait_until(lambda: in_flight(agent) == 0, 20)
