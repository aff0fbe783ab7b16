"""A real Prometheus scrapes the agent through load, switches, a crash, a restart, a reload and refusals.

Then it has nothing but finite samples, counters that never go back, and an answer to each expression of the examples.
"""

import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config
from fakes.waiting import wait_until

EXAMPLES = Path(__file__).parent.parent.parent / "examples" / "grafana"
SCRAPED_EACH_MS = 500
ENDS_OF_COUNTERS = ("_total", "_count", "_sum", "_bucket")
# What each label may be here; what depends on the build has no entry.
CLOSED = {
    "model": {"a", "b"},
    "device": {"cpu:0"},
    "instance": {"node"},
    "job": {"nodeagent"},
    "code": {"200", "503"},
    "status": {"starting", "ready", "degraded", "draining", "stopping"},
    # Of servers, and of clients' connections.
    "state": {"starting", "ready", "unhealthy", "stopping", "backing_off", "failed", "busy", "idle"},
}


class Prometheus:
    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def ask(self, path: str, **parameters: str) -> Any:
        answer = self._http.get(path, params=parameters).json()
        assert answer["status"] == "success", answer
        return answer["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        result: list[dict[str, Any]] = self.ask("/query", query=expression)["result"]
        return result

    def wait_for_scrape(self) -> None:
        """Wait until all that has happened so far has been scraped."""
        began, until = time.time(), time.monotonic() + 20
        while True:
            seen_at = self.query("timestamp(up)")  # none in the first 5 s: until then it looks for no targets
            if seen_at and float(seen_at[0]["value"][1]) > began:
                return
            assert time.monotonic() < until, self.ask("/targets")
            time.sleep(0.05)


@contextmanager
def prometheus(folder: Path, agent: AgentProcess) -> Iterator[Prometheus]:
    program = shutil.which("prometheus", path=os.environ["PATH"] + ":/usr/sbin:/usr/bin")
    assert program is not None, "prometheus is missing: install Debian's package prometheus"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    shutil.copy(EXAMPLES / "alerts.yaml", folder)
    target = {"targets": [agent.base_url.removeprefix("http://")], "labels": {"instance": "node"}}
    every = f"{SCRAPED_EACH_MS}ms"
    config = {
        "rule_files": ["alerts.yaml"],
        "scrape_configs": [
            {"job_name": "nodeagent", "scrape_interval": every, "scrape_timeout": every, "static_configs": [target]}
        ],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    command = [
        program,
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    api = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=10, trust_env=False)
    with subprocess.Popen(command) as process, api:
        try:
            wait_until_ready(f"http://127.0.0.1:{port}/-/ready", process)
            yield Prometheus(api)
        finally:
            process.kill()


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    until = time.monotonic() + 20
    while True:
        try:
            if httpx.get(url, trust_env=False).status_code == 200:
                return
        except httpx.ConnectError:
            assert process.poll() is None, "Prometheus ended"
        assert time.monotonic() < until, "Prometheus is not ready"
        time.sleep(0.05)


def chat(agent: AgentProcess, model: str, **more: Any) -> int:
    body = {"model": model, "messages": [{"role": "user", "content": "hello there"}], "max_tokens": 3, **more}
    url = f"{agent.base_url}/v1/chat/completions"
    return httpx.post(url, json=body, timeout=60, trust_env=False).status_code


def through_its_life(agent: AgentProcess, seen: Prometheus) -> None:
    """Load with a switch of models, a crash, a restart, a reload, and requests that are refused."""
    for model in ("a", "b", "a"):
        assert chat(agent, model) == 200
        assert chat(agent, model, stream=True) == 200
    seen.wait_for_scrape()
    os.kill(agent.wait_child().pid, signal.SIGKILL)
    assert chat(agent, "a") == 200
    operator: Any = {"headers": agent.operator_headers(), "timeout": 60, "trust_env": False}
    assert httpx.post(f"{agent.base_url}/v1/node/models/a/restart", **operator).status_code == 200
    assert chat(agent, "a") == 200
    seen.wait_for_scrape()
    agent.signal(signal.SIGHUP)
    agent.wait_for_line(lambda line: line["message"].startswith("configuration reloaded"))
    assert chat(agent, "no-such-model") == 404
    assert chat(agent, "b") == 200
    assert httpx.post(f"{agent.base_url}/v1/node/drain", **operator).status_code == 200
    agent.wait_for_line(lambda line: "draining" in line["message"])
    time.sleep(0.2)
    assert chat(agent, "a") == 503
    seen.wait_for_scrape()
    seen.wait_for_scrape()  # a rate needs two samples


@pytest.fixture(scope="module")
def seen(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    models = [{"model_id": "a", "path": str(tiny_model)}, {"model_id": "b", "path": str(tiny_model_b)}]
    with (
        running_agent(write_config(folder / "agent", llama_server, models)) as agent,
        prometheus(folder, agent) as server,
    ):
        httpx.get(f"{agent.base_url}/metrics", trust_env=False)  # the first request takes its time: imports
        through_its_life(agent, server)
        yield server


def test_every_sample_is_finite_and_no_counter_goes_back(seen: Prometheus) -> None:
    series = seen.query('{__name__=~"nodeagent_.+"}[5m]')
    assert len(series) > 150
    for one in series:
        name = one["metric"]["__name__"]
        values = [float(value) for _at, value in one["values"]]
        assert all(math.isfinite(value) for value in values), one
        if name.endswith(ENDS_OF_COUNTERS):
            assert values == sorted(values), one
        for label, value in one["metric"].items():
            assert value in CLOSED.get(label, {value}), one
    assert all(value == "1" for one in seen.query('up{job="nodeagent"}[5m]') for _at, value in one["values"])


def test_what_happened_is_counted(seen: Prometheus) -> None:
    def sum_of(name: str, **labels: str) -> float:
        wanted = ", ".join(f'{key}="{value}"' for key, value in labels.items())
        return float(seen.query(f"sum(nodeagent_{name}{{{wanted}}})")[0]["value"][1])

    assert sum_of("requests_total", code="200") == 9
    assert sum_of("requests_total", code="503", reason="draining") == 1
    assert sum_of("generation_tokens_total") == 27
    assert sum_of("backend_exits_total", model="a", reason="killed_by_signal") == 1
    assert sum_of("backend_exits_total", model="a", reason="stopped") >= 2
    assert sum_of("status", status="draining") == 1
    assert sum_of("backend_load_seconds_count", model="a") >= 3
    # By the servers' own count, but for what those that have ended did after they were last asked, 2 s ago at most.
    wait_until(lambda: 3 <= sum_of("backend_generation_tokens_total") <= 27)
    # A server counts whole milliseconds, and a tiny model may take less.
    assert 0 <= sum_of("backend_generation_seconds_total") < 60


def expressions() -> list[str]:
    dashboard = json.loads((EXAMPLES / "dashboard.json").read_text(encoding="utf-8"))
    found = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    for variable, value in (("$instance", ".*"), ("$model", ".*"), ("$__rate_interval", "5m")):
        assert any(variable in one for one in found)
        found = [one.replace(variable, value) for one in found]
    return found


# A CPU tells neither, and nothing has a last reading of the use of its cache unless it was asked.
WITHOUT_DATA = ("temperature", "power", "backend_kv_cache")


def test_each_expression_of_the_dashboard_has_data(seen: Prometheus) -> None:
    for expression in expressions():
        assert "$" not in expression
        assert seen.query(expression) or any(word in expression for word in WITHOUT_DATA), expression


def test_the_alerts_are_rules_that_prometheus_can_evaluate(seen: Prometheus) -> None:
    [group] = seen.ask("/rules")["groups"]
    assert len(group["rules"]) > 5
    known = {name for name in seen.ask("/label/__name__/values") if name.startswith("nodeagent_")} | {
        "nodeagent_device_temperature_celsius"
    }
    for rule in group["rules"]:
        assert rule["health"] != "err", rule
        seen.query(rule["query"])
        assert set(re.findall(r"nodeagent_\w+", rule["query"])) <= known, rule
