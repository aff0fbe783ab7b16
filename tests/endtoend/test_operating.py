"""What operators do with a running agent, by its paths and by the command line."""

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from fakes.agent_process import AgentProcess, running_agent, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]


@pytest.fixture
def config(llama_server: Path, tiny_model: Path, slow_model: Path, tmp_path: Path) -> Path:
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model)},
        {"model_id": "slow", "path": str(slow_model), "threads": 1},
    ]
    return write_config(tmp_path, llama_server, models)


@pytest.fixture
def agent(config: Path) -> Iterator[AgentProcess]:
    with running_agent(config) as agent:
        yield agent


@pytest.fixture
def operator(agent: AgentProcess) -> Iterator[httpx.Client]:
    with operator_of(agent) as http:
        yield http


def operator_of(agent: AgentProcess) -> httpx.Client:
    return httpx.Client(base_url=agent.base_url, headers=agent.operator_headers(), timeout=30, trust_env=False)


@pytest.fixture(scope="module")
def shared_config(
    llama_server: Path, tiny_model: Path, slow_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    models: list[dict[str, Any]] = [
        {"model_id": "tiny", "path": str(tiny_model)},
        {"model_id": "slow", "path": str(slow_model), "threads": 1},
    ]
    return write_config(tmp_path_factory.mktemp("shared"), llama_server, models)


@pytest.fixture(scope="module")
def shared_agent(shared_config: Path) -> Iterator[AgentProcess]:
    with running_agent(shared_config) as agent:
        yield agent


@pytest.fixture
def idle_agent(shared_agent: AgentProcess) -> AgentProcess:
    """One for all tests that leave its configuration as it was, without a model that is loaded, and in service."""
    with operator_of(shared_agent) as http:
        for order in ("models/tiny/unload", "models/slow/unload", "undrain"):
            assert http.post(f"/v1/node/{order}", json={"force": True} if "unload" in order else None).is_success
    shared_agent.forget_lines()
    return shared_agent


@pytest.fixture
def idle_operator(idle_agent: AgentProcess) -> Iterator[httpx.Client]:
    with operator_of(idle_agent) as http:
        yield http


def command(config: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    argv = [sys.executable, "-m", "nodeagent", *arguments, "--config", str(config)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)


def said(config: Path, *arguments: str) -> Any:
    ended = command(config, *arguments)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def chat(agent: AgentProcess, model: str, tokens: int = 2) -> httpx.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": tokens}
    return httpx.post(f"{agent.base_url}/v1/chat/completions", json=body, timeout=30, trust_env=False)


def servers(agent: AgentProcess) -> dict[str, dict[str, Any]]:
    device = httpx.get(f"{agent.base_url}/v1/node/inventory", timeout=30, trust_env=False).json()["devices"][0]
    return {server["model_id"]: server for server in device["servers"]}


def test_models_are_loaded_restarted_and_unloaded_by_the_command_line(agent: AgentProcess, config: Path) -> None:
    assert said(config, "load", "tiny") == {"model_id": "tiny", "device_id": "cpu:0", "state": "ready"}
    assert servers(agent)["tiny"]["generation"] == 1
    assert said(config, "restart", "tiny") == {"model_id": "tiny", "restarted_on": ["cpu:0"]}
    assert servers(agent)["tiny"]["generation"] == 2
    shown = command(config, "status").stdout
    assert "test-node" in shown
    assert "cpu:0   tiny   ready  2" in shown
    assert said(config, "status", "--json")["node_id"] == "test-node"
    assert said(config, "unload", "tiny") == {"model_id": "tiny", "unloaded_from": ["cpu:0"]}
    assert agent.children() == []
    assert "load_model: loading model" in command(config, "logs", "cpu:0").stdout


def test_a_load_can_be_begun_without_waiting_for_it(
    idle_agent: AgentProcess, shared_config: Path, idle_operator: httpx.Client
) -> None:
    assert said(shared_config, "load", "tiny", "--no-wait", "--device", "cpu:0")["state"] == "starting"
    idle_agent.wait_for_line(lambda line: "cpu:0/tiny is ready" in line["message"])
    assert idle_operator.post("/v1/node/models/slow/load", json={"wait": False}).status_code == 202
    idle_agent.wait_for_line(lambda line: "cpu:0/slow is ready" in line["message"])


def test_what_can_not_be_done_is_said_in_one_line_with_exit_code_1(
    idle_agent: AgentProcess, shared_config: Path
) -> None:
    for arguments, words in (
        (("load", "huge"), "'huge' is not served here"),
        (("load", "tiny", "--device", "gpu:7"), "no device 'gpu:7' here, only: cpu:0"),
        (("logs", "gpu:7"), "no device 'gpu:7'"),
    ):
        ended = command(shared_config, *arguments)
        assert ended.returncode == 1
        assert words in ended.stderr
        assert len(ended.stderr.strip().splitlines()) == 1


def test_the_command_line_says_so_where_no_agent_runs(config: Path) -> None:
    ended = command(config, "status")
    assert ended.returncode == 1
    assert "no agent has run" in ended.stderr


def test_unloading_waits_for_a_stream_and_force_ends_it(idle_agent: AgentProcess, idle_operator: httpx.Client) -> None:
    body = {"model": "slow", "messages": HELLO, "max_tokens": 150, "stream": True}

    def stream(tokens: int, begun: threading.Event) -> str:
        text = ""
        with httpx.stream(
            "POST",
            f"{idle_agent.base_url}/v1/chat/completions",
            json=body | {"max_tokens": tokens},
            timeout=60,
            trust_env=False,
        ) as answer:
            for piece in answer.iter_text():
                begun.set()
                text += piece
        return text

    with ThreadPoolExecutor(1) as pool:
        begun = threading.Event()
        text = pool.submit(stream, 150, begun)
        assert begun.wait(30)
        assert idle_operator.post("/v1/node/models/slow/unload").json()["unloaded_from"] == ["cpu:0"]
        assert text.done()
        assert text.result().rstrip().endswith("data: [DONE]")
        begun.clear()
        text = pool.submit(stream, 5000, begun)
        assert begun.wait(30)
        assert idle_operator.post("/v1/node/models/slow/unload", json={"force": True}).status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            text.result(5)


def test_only_operators_may_and_no_web_page(idle_agent: AgentProcess, idle_operator: httpx.Client) -> None:
    paths = [
        ("POST", "/v1/node/models/tiny/load"),
        ("POST", "/v1/node/models/tiny/unload"),
        ("POST", "/v1/node/models/tiny/restart"),
        ("POST", "/v1/node/drain"),
        ("POST", "/v1/node/undrain"),
        ("POST", "/v1/node/reload"),
        ("POST", "/v1/node/register"),
        ("GET", "/v1/node/events"),
        ("GET", "/v1/node/devices/cpu:0/logs"),
    ]
    for method, path in paths:
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            (dict(idle_operator.headers) | {"Origin": "http://evil.example"}, 403),
            (dict(idle_operator.headers) | {"Sec-Fetch-Site": "same-origin", "Host": "evil.example"}, 403),
        ):
            answer = httpx.request(method, idle_agent.base_url + path, headers=headers, timeout=30, trust_env=False)
            assert answer.status_code == status, (method, path)
    assert idle_agent.children() == []
    assert httpx.get(f"{idle_agent.base_url}/v1/node/queue", trust_env=False).status_code == 200


def test_the_token_is_readable_by_its_user_alone(idle_agent: AgentProcess, shared_config: Path) -> None:
    token = shared_config.parent / "state" / "admin.token"
    assert token.stat().st_mode & 0o777 == 0o600
    assert len(token.read_text().strip()) >= 43  # 32 bytes


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"force": "yes"}', b'{"frce": true}'])
def test_a_malformed_order_changes_nothing(idle_operator: httpx.Client, body: bytes) -> None:
    assert idle_operator.post("/v1/node/models/tiny/unload", content=body).status_code == 400


def test_events_tell_every_transition_and_resume_where_a_reader_left(
    agent: AgentProcess, operator: httpx.Client
) -> None:
    operator.post("/v1/node/models/tiny/load")
    agent.wait_child().kill()
    operator.post("/v1/node/models/tiny/load")
    seen = read_events(operator, until=lambda events: events[-1]["kind"] == "ready" and events[-1]["generation"] == 2)
    kinds = [event["kind"] for event in seen]
    assert kinds == ["node", "starting", "ready", "exited", "backing_off", "starting", "ready"]
    assert "SIGKILL" in seen[3]["reason"]
    assert seen[3]["last_lines"]
    numbers = [event["id"] for event in seen]
    assert numbers == list(range(1, 8))
    rest = read_events(operator, after=5, until=lambda events: len(events) == 2)
    assert [event["id"] for event in rest] == [6, 7]


def read_events(operator: httpx.Client, *, until: Any, after: int = 0) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    with operator.stream("GET", "/v1/node/events", headers={"Last-Event-ID": str(after)}) as answer:
        number = 0
        for line in answer.iter_lines():
            if line.startswith("id: "):
                number = int(line.removeprefix("id: "))
            if line.startswith("data: "):
                events.append({"id": number, **json.loads(line.removeprefix("data: "))})
                if until(events):
                    return events
    raise AssertionError("the stream of events ended")


def test_logs_follow(idle_agent: AgentProcess, idle_operator: httpx.Client) -> None:
    idle_operator.post("/v1/node/models/tiny/load")
    with idle_operator.stream("GET", "/v1/node/devices/cpu:0/logs", params={"lines": 1, "follow": "true"}) as answer:
        lines = answer.iter_lines()
        next(lines)
        chat(idle_agent, "tiny")
        assert any("launch_slot" in line for line, _ in zip(lines, range(20), strict=False))


def test_drain_refuses_new_requests_until_undrain(idle_agent: AgentProcess, shared_config: Path) -> None:
    assert command(shared_config, "drain").stdout == "the node is draining (drained by an operator)\n"
    assert chat(idle_agent, "tiny").json()["error"]["code"] == "draining"
    assert httpx.get(f"{idle_agent.base_url}/readyz?drain=404", trust_env=False).status_code == 404
    assert command(shared_config, "undrain").stdout == "the node is ready\n"
    assert chat(idle_agent, "tiny").status_code == 200


def rewrite(config: Path, **keys: Any) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | keys))


def test_a_reload_adds_changes_and_removes_models_and_leaves_the_others_alone(
    agent: AgentProcess, config: Path, tiny_model: Path
) -> None:
    assert chat(agent, "tiny").status_code == 200
    child = agent.wait_child()
    tiny, slow = json.loads(config.read_text())["models"]
    rewrite(config, models=[tiny, {"model_id": "new", "path": str(tiny_model)}], queue_timeout_s=7, listen_port=1)
    assert said(config, "reload") == {
        "added": ["new"],
        "changed": [],
        "removed": ["slow"],
        "needs_restart": ["listen_port"],
    }
    assert agent.wait_child().pid == child.pid
    assert chat(agent, "slow").status_code == 404
    assert chat(agent, "tiny").status_code == 200
    assert agent.wait_child().pid == child.pid
    rewrite(config, models=[tiny | {"ctx_size": 512}, slow], listen_port=0)
    agent.signal(signal.SIGHUP)
    agent.wait_for_line(lambda line: "cpu:0/tiny has stopped" in line["message"])
    assert chat(agent, "tiny").status_code == 200
    arguments = agent.wait_child().cmdline()
    assert arguments[arguments.index("-c") + 1] == "512"
    assert chat(agent, "slow").status_code == 200
    assert chat(agent, "new").status_code == 404


def test_a_reload_lets_a_stream_of_a_changed_model_end(agent: AgentProcess, config: Path) -> None:
    body = {"model": "slow", "messages": HELLO, "max_tokens": 150, "stream": True}
    with httpx.stream(
        "POST", f"{agent.base_url}/v1/chat/completions", json=body, timeout=60, trust_env=False
    ) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        tiny, slow = json.loads(config.read_text())["models"]
        rewrite(config, models=[tiny, slow | {"ctx_size": 1024}])
        assert said(config, "reload")["changed"] == ["slow"]
        assert "".join([text, *pieces]).rstrip().endswith("data: [DONE]")
    agent.wait_for_line(lambda line: "cpu:0/slow has stopped" in line["message"])


def test_a_bad_configuration_changes_nothing_and_says_why(agent: AgentProcess, config: Path) -> None:
    assert chat(agent, "tiny").status_code == 200
    child = agent.wait_child()
    rewrite(config, queue_timeout_s="soon", models=[])
    ended = command(config, "reload")
    assert ended.returncode == 78
    assert "queue_timeout_s" in ended.stderr, "the running agent itself says what is wrong"
    agent.signal(signal.SIGHUP)
    line = agent.wait_for_line(lambda line: "the old one stays" in line["message"])
    assert "queue_timeout_s" in line["message"]
    assert chat(agent, "tiny").status_code == 200
    assert agent.wait_child().pid == child.pid


def test_an_idle_model_is_unloaded(llama_server: Path, tiny_model: Path, tmp_path: Path) -> None:
    models = [{"model_id": "tiny", "path": str(tiny_model), "idle_unload_s": 0.5}]
    with running_agent(write_config(tmp_path, llama_server, models)) as agent:
        assert chat(agent, "tiny").status_code == 200
        agent.wait_for_line(lambda line: "cpu:0/tiny has stopped" in line["message"], 5)
        assert agent.children() == []
        assert chat(agent, "tiny").status_code == 200


def test_a_forced_unload_ends_a_request_for_good_and_blames_it_for_nothing(
    idle_agent: AgentProcess, idle_operator: httpx.Client
) -> None:
    for _time in range(2):
        assert idle_operator.post("/v1/node/models/slow/load").status_code == 200
        with ThreadPoolExecutor(1) as pool:
            asked = pool.submit(chat, idle_agent, "slow", 200)
            while not _in_flight(idle_agent):
                pass
            assert idle_operator.post("/v1/node/models/slow/unload", json={"force": True}).status_code == 200
            answer = asked.result(20)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "backend_unavailable")
        assert answer.headers["retry-after"] == "1"
        assert idle_agent.children() == []
    assert chat(idle_agent, "slow", 200).status_code == 200


def _in_flight(agent: AgentProcess) -> int:
    [lane] = httpx.get(f"{agent.base_url}/v1/node/queue", timeout=30, trust_env=False).json()["lanes"]
    return int(lane["in_flight"])


def test_a_load_of_a_model_that_is_ready_does_not_wait_for_the_request_on_it(
    idle_agent: AgentProcess, idle_operator: httpx.Client
) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(chat, idle_agent, "slow", 300)
        while not _in_flight(idle_agent):
            pass
        assert idle_operator.post("/v1/node/models/slow/load").status_code == 200
        assert not asked.done()
        assert asked.result(30).status_code == 200


@pytest.fixture
def failing(llama_server: Path, tiny_model: Path, tmp_path: Path) -> Path:
    """A model whose server ends at once, until its template is there; after one end it has failed, for long."""
    template = {"chat_template_file": str(tmp_path / "template.jinja")}
    models = [{"model_id": "tiny", "path": str(tiny_model), "server_args": template}]
    return write_config(tmp_path, llama_server, models, restart={"max_restarts": 0, "cooldown_s": 300})


def _fail(agent: AgentProcess) -> None:
    answer = chat(agent, "tiny")
    assert answer.status_code == 503, answer.text
    assert servers(agent)["tiny"]["state"] == "failed"
    assert int(answer.headers["retry-after"]) > 100


@pytest.mark.parametrize("order", [("load", "tiny"), ("load", "tiny", "--device", "cpu:0"), ("restart", "tiny")])
def test_an_operator_has_a_model_tried_again_that_has_failed(failing: Path, order: tuple[str, ...]) -> None:
    with running_agent(failing) as agent:
        _fail(agent)
        (failing.parent / "template.jinja").write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
        said(failing, *order)
        assert chat(agent, "tiny").status_code == 200


def test_a_reload_that_mends_a_model_has_it_tried_again(failing: Path) -> None:
    with running_agent(failing) as agent:
        _fail(agent)
        config = json.loads(failing.read_text())
        del config["models"][0]["server_args"]
        failing.write_text(json.dumps(config))
        assert said(failing, "reload")["changed"] == ["tiny"]
        assert chat(agent, "tiny").status_code == 200


def test_a_reload_of_how_servers_are_kept_restarts_none(agent: AgentProcess, config: Path) -> None:
    assert chat(agent, "tiny").status_code == 200
    keys = json.loads(config.read_text())
    config.write_text(json.dumps(keys | {"restart": {"max_restarts": 7}, "llama_server_stop_grace_s": 2}))
    said(config, "reload")
    assert chat(agent, "tiny").status_code == 200
    assert servers(agent)["tiny"]["generation"] == 1


def test_what_a_failed_server_printed_is_for_operators_only(failing: Path) -> None:
    printed = "it last printed: "
    with running_agent(failing) as agent:
        answer = chat(agent, "tiny")
        assert answer.status_code == 503, answer.text
        public = [answer.text, *(_get(agent, path) for path in ("/readyz", "/v1/node/inventory", "/v1/node/queue"))]
        assert not [text for text in public if printed in text]
        assert "exited with code 1" in answer.text
        assert printed in command(failing, "status").stdout
        refused = command(failing, "load", "tiny")
        assert printed in refused.stderr, refused
        page = httpx.get(
            f"{agent.base_url}/v1/node/inventory",
            headers={"Authorization": f"Bearer {_token(failing)}", "Origin": "https://evil.example"},
            trust_env=False,
        )
        assert printed not in page.text


def _get(agent: AgentProcess, path: str) -> str:
    return httpx.get(agent.base_url + path, timeout=30, trust_env=False).text


def _token(config: Path) -> str:
    return (config.parent / "state" / "admin.token").read_text().strip()
