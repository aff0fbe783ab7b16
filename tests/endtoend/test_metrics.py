"""The metrics of the agent as a process, with real llama-servers, read by Prometheus' own parser and tools."""

import math
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families

from fakes.agent_process import AgentProcess, running_agent, write_config
from fakes.waiting import wait_until

HELLO: Any = [{"role": "user", "content": "hello there"}]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def agent(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentProcess]:
    models = [{"model_id": "a", "path": str(tiny_model)}, {"model_id": "b", "path": str(tiny_model_b)}]
    with running_agent(write_config(tmp_path_factory.mktemp("agent"), llama_server, models)) as agent:
        yield agent


@pytest.fixture(scope="module")
def slow(llama_server: Path, slow_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[AgentProcess]:
    models = [{"model_id": "slow", "path": str(slow_model), "threads": 1}]
    with running_agent(write_config(tmp_path_factory.mktemp("slow"), llama_server, models)) as agent:
        yield agent


def scrape(agent: AgentProcess) -> str:
    answer = httpx.get(f"{agent.base_url}/metrics", trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return answer.text


def samples(agent: AgentProcess) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(scrape(agent))
        for sample in family.samples
    }


def value(of: Samples, name: str, **labels: str) -> float:
    return of.get((f"nodeagent_{name}", frozenset(labels.items())), 0.0)


def chat(agent: AgentProcess, model: str = "a", **more: Any) -> httpx.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": 4, **more}
    return httpx.post(f"{agent.base_url}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def test_requests_and_their_tokens_are_counted(agent: AgentProcess) -> None:
    before = samples(agent)
    assert chat(agent).status_code == 200
    assert chat(agent, stream=True).status_code == 200
    after = samples(agent)

    def grown(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert grown("requests_total", model="a", code="200", reason="") == 2
    assert grown("generation_tokens_total", model="a") == 8
    assert grown("prompt_tokens_total", model="a") + grown("cached_prompt_tokens_total", model="a") > 8
    for name in ("request_duration_seconds", "time_to_first_token_seconds", "queue_wait_seconds"):
        assert grown(f"{name}_count", model="a") == 2
        assert grown(f"{name}_bucket", model="a", le="+Inf") == 2
    assert value(after, "backend_state", device="cpu:0", model="a", state="ready") == 1
    assert value(after, "num_requests_running") == 0
    until = time.monotonic() + 10  # the loop is looked at once in a while
    while not value(samples(agent), "event_loop_lag_seconds_count"):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_connections_of_clients_are_counted_by_whether_they_serve_a_request(agent: AgentProcess) -> None:
    def connections(state: str) -> float:
        return value(samples(agent), "connections", state=state)

    address = urlsplit(agent.base_url)
    idle_before = connections("idle")
    with socket.create_connection((address.hostname, address.port)) as first:
        wait_until(lambda: connections("idle") == idle_before + 1)
        assert connections("busy") == 1, "that of the scrape itself"
        first.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        wait_until(lambda: connections("busy") == 2)
        assert connections("idle") == idle_before
    wait_until(lambda: connections("busy") == 1)


def test_no_counter_goes_back_and_every_sample_is_finite_through_switches_and_crashes(agent: AgentProcess) -> None:
    last = samples(agent)
    for number in range(4):
        chat(agent, "ab"[number % 2])
        if number == 2:
            os.kill(agent.wait_child().pid, signal.SIGKILL)
            until = time.monotonic() + 20
            while not value(
                samples(agent), "backend_exits_total", device="cpu:0", model="a", reason="killed_by_signal"
            ):
                assert time.monotonic() < until
                time.sleep(0.05)
        now = samples(agent)
        assert all(math.isfinite(it) for it in now.values())
        counters = [key for key in last if key[0].endswith(("_total", "_count", "_sum", "_bucket"))]
        assert all(now[key] >= last[key] for key in counters)
        last = now


def test_the_use_of_the_kv_cache_is_told_while_a_stream_runs(
    slow: AgentProcess,
) -> None:
    body = {"model": "slow", "prompt": "once", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{slow.base_url}/v1/completions", json=body, timeout=60, trust_env=False) as stream:
        lines = stream.iter_lines()
        for _ in range(40):
            next(lines)
        now = samples(slow)
        ratio = value(now, "backend_kv_cache_usage_ratio", device="cpu:0", model="slow")
        assert 0 < ratio < 1
        assert value(now, "kv_cache_usage_ratio") == ratio
    until = time.monotonic() + 10
    while value(samples(slow), "num_requests_running"):
        assert time.monotonic() < until
    time.sleep(2.1)  # an older look is good for 2 s
    assert value(samples(slow), "kv_cache_usage_ratio") == 0


def test_openmetrics_is_spoken_to_those_who_ask_for_it(agent: AgentProcess) -> None:
    accept = {"Accept": "application/openmetrics-text; version=1.0.0"}
    answer = httpx.get(f"{agent.base_url}/metrics", headers=accept, trust_env=False)
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    names = {family.name for family in parse_openmetrics(answer.text)}  # type: ignore[no-untyped-call]
    assert {"nodeagent_requests", "nodeagent_build", "nodeagent_status"} <= names


@pytest.mark.parametrize("version", ["x", "1.0.x", "9" * 5000])
def test_who_asks_for_a_version_that_is_none_gets_the_plain_format(agent: AgentProcess, version: str) -> None:
    accept = {"Accept": f"application/openmetrics-text; version={version}"}
    answer = httpx.get(f"{agent.base_url}/metrics", headers=accept, trust_env=False)
    assert (answer.status_code, answer.headers["content-type"].split(";")[0]) == (200, "text/plain")


def test_promtool_finds_nothing_to_complain_about(agent: AgentProcess) -> None:
    promtool = shutil.which("promtool", path=os.environ["PATH"] + ":/usr/sbin:/usr/bin")
    assert promtool is not None, "promtool is missing: install Debian's package prometheus"
    chat(agent)
    done = subprocess.run(
        [promtool, "check", "metrics"], input=scrape(agent), capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
