"""The operators' commands, in this process, against a small server that stands for the agent."""

import http.server
import json
import logging
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from nodeagent.cli.events_table import event_line
from nodeagent.cli.main import main
from nodeagent.cli.operations import table

TOKEN = "the-token-of-the-state-folder"
JSON = "application/json"


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    target: str
    authorization: str | None
    body: Any


@dataclass(slots=True)
class Agent:
    """Canned responses (status, media type, body) by method and path; `requests` are those that came."""

    config: Path
    responses: dict[str, tuple[int, str, str]] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)

    def respond(self, request: str, body: Any, status: int = 200) -> None:
        self.responses[request] = (status, JSON, json.dumps(body))

    def run(self, *argv: str) -> int:
        return main([*argv, "--config", str(self.config)])


@pytest.fixture
def agent(tiny_model: Path, tmp_path: Path) -> Iterator[Agent]:
    state_dir = tmp_path / "state"
    state_dir.mkdir()
    config = tmp_path / "node.yaml"
    config.write_text(
        json.dumps({"state_dir": str(state_dir), "models": [{"model_id": "tiny", "path": str(tiny_model)}]})
    )
    agent = Agent(config)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler(agent)) as server:
        (state_dir / "address").write_text(f"http://127.0.0.1:{server.server_port}\n")
        (state_dir / "admin.token").write_text(f"{TOKEN}\n")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield agent
        finally:
            server.shutdown()
            thread.join()


def handler(agent: Agent) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.loads(content) if content else None
            agent.requests.append(Request(self.command, self.path, self.headers["Authorization"], body))
            status, media_type, text = agent.responses[f"{self.command} {self.path.partition('?')[0]}"]
            self.send_response(status)
            self.send_header("Content-Type", media_type)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            logging.getLogger(__name__).debug(format, *arguments)

    return Handler


def inventory(**changes: Any) -> dict[str, Any]:
    server = {"model_id": "tiny", "state": "ready", "generation": 2, "ready_in_s": None, "reason": None}
    server["slot_ctx_size"] = 4096
    device = {
        "device_id": "cpu:0",
        "lane": {"in_flight": 1, "waiting": 3, "limit": 64},
        "metrics": {"memory_free_bytes": 3 * 2**29},
        "servers": [server],
    }
    model = {"model_id": "tiny", "loaded_on": ["cpu:0"], "size_bytes": 2**30, "load_time_s": 1.25, "roles": ["chat"]}
    fit = {"device_id": "cpu:0", "state": "loaded", "why": "preload, pinned", "memory_needed_bytes": 2**29}
    model["fits"] = [
        fit | {"measured": True},
        fit | {"device_id": "gpu:0", "state": "needs_room", "why": "needs more", "measured": False},
    ]
    whole = {
        "node_id": "n1",
        "base_url": "http://10.0.0.1:8081",
        "status": "ready",
        "reasons": [],
        "devices": [device],
        "models": [model],
    }
    return whole | changes


# --- The table --------------------------------------------------------------------------------------------------


def test_the_table_has_a_row_per_server_and_per_model() -> None:
    assert table(inventory()).splitlines() == [
        "n1 at http://10.0.0.1:8081: ready",
        "",
        "DEVICE  MODEL  STATE  GEN  CONTEXT  IN FLIGHT  WAITING  MEMORY FREE  REASON",
        "cpu:0   tiny   ready  2    4096     1          3/64     1.5 GiB",
        "",
        "MODEL  LOADED ON  SIZE     LOADS IN  ROLES",
        "tiny   cpu:0      1.0 GiB  1.2 s     chat",
        "",
        "MODEL  DEVICE  STATE       MEMORY    WHY",
        "tiny   cpu:0   loaded      0.5 GiB   preload, pinned",
        "tiny   gpu:0   needs room  ~0.5 GiB  needs more",
    ]


def test_the_table_says_why_a_node_is_degraded_and_a_server_is_not_ready() -> None:
    device = inventory()["devices"][0]
    backing_off = device["servers"][0] | {"state": "backing_off", "ready_in_s": 4.2, "reason": "exit 1"}
    empty = device | {"device_id": "gpu:0", "servers": [], "metrics": {"memory_free_bytes": None}}
    model = inventory()["models"][0] | {"loaded_on": [], "load_time_s": None, "roles": [], "size_bytes": None}
    del model["fits"]  # as an older agent
    text = table(
        inventory(
            status="degraded",
            reasons=["tiny failed on cpu:0"],
            devices=[device | {"servers": [backing_off]}, empty],
            models=[model],
        )
    )
    head, reason, _, _, first, second, _, _, last, _, _ = text.splitlines()
    assert (head, reason) == ("n1 at http://10.0.0.1:8081: degraded", "  tiny failed on cpu:0")
    assert first.endswith("ready in 4 s: exit 1")
    assert second.split() == ["gpu:0", "-", "empty", "-", "-", "1", "3/64", "-"]
    assert last.split() == ["tiny", "-", "-", "-", "-"]


def test_the_table_shows_a_server_that_spans_devices_on_each_of_them() -> None:
    [home] = inventory()["devices"]
    home["servers"][0]["device_ids"] = ["gpu:1", "gpu:0"]
    other = home | {"device_id": "gpu:0", "servers": [], "used_by": ["tiny"]}
    rows = table(inventory(devices=[home, other])).splitlines()[3:5]
    assert rows[0].endswith("1.5 GiB      spans gpu:1, gpu:0")
    assert rows[1].split() == ["gpu:0", "tiny", "spans", "it", "-", "-", "1", "3/64", "1.5", "GiB"]


# --- The commands -----------------------------------------------------------------------------------------------


@pytest.mark.real
def test_status_prints_the_table_or_the_whole_inventory(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    agent.respond("GET /v1/node/inventory", inventory())
    assert agent.run("status") == 0
    assert capsys.readouterr().out == table(inventory()) + "\n"
    assert agent.run("status", "--json") == 0
    assert json.loads(capsys.readouterr().out) == inventory()


@pytest.mark.real
@pytest.mark.parametrize(
    ("argv", "path", "body"),
    [
        (("load", "tiny"), "models/tiny/load", {"device_id": None, "wait": True}),
        (
            ("load", "tiny", "--device", "gpu:1", "--no-wait"),
            "models/tiny/load",
            {"device_id": "gpu:1", "wait": False},
        ),
        (("unload", "tiny"), "models/tiny/unload", {"force": False}),
        (("unload", "tiny", "--force"), "models/tiny/unload", {"force": True}),
        (("restart", "tiny"), "models/tiny/restart", {"force": False}),
        (("reload",), "reload", None),
    ],
)
def test_an_order_is_one_request_with_the_admin_token_and_its_response_is_printed(
    agent: Agent, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], path: str, body: Any
) -> None:
    agent.respond(f"POST /v1/node/{path}", {"done": "it is"})
    assert agent.run(*argv) == 0
    assert agent.requests == [Request("POST", f"/v1/node/{path}", f"Bearer {TOKEN}", body)]
    assert json.loads(capsys.readouterr().out) == {"done": "it is"}


@pytest.mark.real
def test_events_prints_the_data_of_each_event(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    stream = ': hello\n\nid: 6\ndata: {"kind": "ready"}\n\nid: 7\ndata: {"kind": "exited"}\n\n'
    agent.responses["GET /v1/node/events"] = (200, "text/event-stream", stream)
    assert agent.run("events", "--after", "5", "--json") == 0
    assert agent.requests[0].target == "/v1/node/events?after=5&follow=true"
    assert capsys.readouterr().out == '{"kind": "ready"}\n{"kind": "exited"}\n'


RECORD = {
    "id": 7,
    "time": "2026-03-02T10:00:00.000Z",
    "status": 200,
    "key_name": None,
    "device_id": "cpu:0",
    "model_id": "tiny",
    "queue_ms": 1250.0,
    "load_ms": 0.0,
    "first_token_ms": 20.0,
    "duration_ms": 2000.0,
    "prompt_tokens": 8,
    "completion_tokens": 4,
    "tokens_per_s": 48.78,
    "error": None,
}


@pytest.mark.real
def test_activity_is_a_table_for_people_the_oldest_first(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    refused = RECORD | {"id": 8, "status": 429, "error": "queue_full", "model_id": None, "duration_ms": 0.5}
    agent.respond("GET /v1/node/activity", {"activity": [refused, RECORD]})
    assert agent.run("activity", "--limit", "2", "--model", "tiny") == 0
    assert agent.requests[0].target == "/v1/node/activity?limit=2&model_id=tiny"
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["ID", "TIME", "STATUS", "KEY"]
    assert (first.split()[0], first.split()[2:6]) == ("7", ["200", "-", "cpu:0", "tiny"])
    assert first.split()[6:] == ["1.25", "s", "0.00", "s", "0.02", "s", "2.00", "s", "8", "4", "48.78"]
    assert second.split()[-1] == "queue_full"


@pytest.mark.real
def test_activity_for_programs_is_one_object_a_line_and_goes_on_where_the_list_ended(
    agent: Agent, capsys: pytest.CaptureFixture[str]
) -> None:
    agent.respond("GET /v1/node/activity", {"activity": [RECORD]})
    assert agent.run("activity", "--json") == 0
    assert json.loads(capsys.readouterr().out) == RECORD
    assert agent.run("activity", "--json", "--follow") == 0
    assert agent.requests[-1].target == "/v1/node/activity?limit=20&follow=true&since=7"


@pytest.mark.real
def test_one_request_is_shown_with_its_bodies_and_without_control_characters(
    agent: Agent, capsys: pytest.CaptureFixture[str]
) -> None:
    text = {"type": "application/json", "bytes": 70_000, "cut": True, "text": '{"a":\n "\x1b[31m"'}
    form = {"type": "multipart/form-data", "bytes": 9, "cut": False, "text": None}
    agent.respond("GET /v1/node/activity/7", RECORD | {"request_body": form, "answer_body": text})
    assert agent.run("activity", "--id", "7") == 0
    head, line, *rest = capsys.readouterr().out.splitlines()
    assert (head.split()[0], line.split()[0]) == ("ID", "7")
    assert rest == [
        "",
        "Request (multipart/form-data, 9 bytes): no text",
        "",
        "Answer (application/json, 70000 bytes, cut):",
        '{"a":',
        r' "\x1b[31m"',
    ]
    assert agent.run("activity", "--id", "7", "--json") == 0
    assert json.loads(capsys.readouterr().out)["answer_body"] == text
    agent.respond("GET /v1/node/activity/7", RECORD | {"request_body": None, "answer_body": None})
    assert agent.run("activity", "--id", "7") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Its bodies are not kept: ")
    error = {"message": "There is no record 8; ...", "type": "invalid_request_error", "code": "record_not_found"}
    agent.respond("GET /v1/node/activity/8", {"error": error}, 404)
    assert agent.run("activity", "--id", "8") == 1
    assert "There is no record 8" in capsys.readouterr().err


@pytest.mark.real
def test_events_are_lines_for_people_and_can_end_with_those_so_far(
    agent: Agent, capsys: pytest.CaptureFixture[str]
) -> None:
    event: dict[str, Any] = {
        "at": "2026-11-25T18:07:11.123Z",
        "kind": "exited",
        "device_id": "cpu:0",
        "model_id": "tiny",
    }
    event |= {"generation": 7, "reason": "code 1: \x1b[31mred"}
    stream = f"id: 6\ndata: {json.dumps(event)}\n\n"
    agent.responses["GET /v1/node/events"] = (200, "text/event-stream", stream)
    assert agent.run("events", "--no-follow") == 0
    assert agent.requests[0].target == "/v1/node/events?after=0&follow=false"
    [line] = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"\d\d:07:11 cpu:0 tiny exited \(generation 7\): code 1: \\x1b\[31mred", line)


@pytest.mark.parametrize(
    ("event", "line"),
    [
        ({"at": "nonsense", "kind": "node", "reason": "ready"}, "--:--:-- node: ready"),
        ({"kind": "ready", "device_id": "cpu:0", "generation": 0}, "--:--:-- cpu:0 ready (generation 0)"),
        ({}, "--:--:-- ?"),
    ],
)
def test_an_event_with_missing_parts_is_still_a_line(event: dict[str, Any], line: str) -> None:
    assert event_line(event) == line


@pytest.mark.real
@pytest.mark.parametrize("order", ["drain", "undrain"])
def test_drain_and_undrain_say_in_words_what_the_node_does(
    agent: Agent, capsys: pytest.CaptureFixture[str], order: str
) -> None:
    agent.respond(f"POST /v1/node/{order}", {"status": "draining", "reasons": ["drained by an operator"]})
    assert agent.run(order) == 0
    assert agent.requests == [Request("POST", f"/v1/node/{order}", f"Bearer {TOKEN}", None)]
    assert capsys.readouterr().out == "the node is draining (drained by an operator)\n"


@pytest.mark.real
def test_logs_prints_the_lines_of_a_device(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    lines = "one\nzwölf\x1b[2J\n"
    agent.responses["GET /v1/node/devices/cpu:0/logs"] = (200, "text/plain; charset=utf-8", lines)
    assert agent.run("logs", "cpu:0", "--lines", "2", "-f") == 0
    assert agent.requests[0].target == "/v1/node/devices/cpu:0/logs?lines=2&follow=true"
    assert capsys.readouterr().out == "one\nzwölf\\x1b[2J\n"


# --- What goes wrong --------------------------------------------------------------------------------------------

ORDERS: list[tuple[tuple[str, ...], str]] = [
    (("status",), "GET /v1/node/inventory"),
    (("load", "tiny"), "POST /v1/node/models/tiny/load"),
    (("unload", "tiny"), "POST /v1/node/models/tiny/unload"),
    (("drain",), "POST /v1/node/drain"),
    (("events",), "GET /v1/node/events"),
    (("logs", "cpu:0"), "GET /v1/node/devices/cpu:0/logs"),
]


@pytest.mark.real
@pytest.mark.parametrize(("argv", "request_line"), ORDERS)
def test_a_refusal_is_the_agents_own_message_in_one_line_with_exit_code_1(
    agent: Agent, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], request_line: str
) -> None:
    agent.respond(request_line, {"error": {"message": "the node is stopping"}}, 503)
    assert agent.run(*argv) == 1
    assert capsys.readouterr() == ("", "rolemesh-node-agent: the node is stopping\n")


@pytest.mark.real
@pytest.mark.parametrize(("argv", "request_line"), ORDERS)
def test_an_error_that_is_not_the_agents_is_one_line_with_its_status(
    agent: Agent, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], request_line: str
) -> None:
    agent.responses[request_line] = (502, "text/html", "<h1>Bad Gateway</h1>")
    assert agent.run(*argv) == 1
    assert capsys.readouterr() == ("", "rolemesh-node-agent: the agent answered 502 without JSON\n")


@pytest.mark.real
@pytest.mark.parametrize("body", [[], {"error": "no"}, {"error": {}}, {"detail": "no"}, {"error": {"message": 7}}])
def test_json_of_another_server_is_one_line_with_its_status(
    agent: Agent, capsys: pytest.CaptureFixture[str], body: Any
) -> None:
    agent.respond("POST /v1/node/drain", body, 404)
    assert agent.run("drain") == 1
    assert capsys.readouterr() == ("", "rolemesh-node-agent: the agent answered 404 without a message\n")


@pytest.mark.real
def test_an_agent_that_is_gone_is_one_line_with_its_address(agent: Agent, capsys: pytest.CaptureFixture[str]) -> None:
    address = agent.config.parent / "state" / "address"
    address.write_text("http://127.0.0.1:1\n")
    assert agent.run("status") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == (
        "rolemesh-node-agent: no agent answers at http://127.0.0.1:1 (connection refused): is it running? "
        f"Its address was read from {address}"
    )


def without_address(state_dir: Path) -> str:
    (state_dir / "address").unlink()
    return "no agent has run with state_dir"


def without_token(state_dir: Path) -> str:
    (state_dir / "admin.token").write_text("\n")
    return "is empty"


@pytest.mark.real
@pytest.mark.parametrize("damage", [without_address, without_token])
def test_a_state_folder_that_says_too_little_is_one_line(
    agent: Agent, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], str]
) -> None:
    words = damage(agent.config.parent / "state")
    assert agent.run("status") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert words in line
    assert agent.requests == []


@pytest.mark.real
def test_without_a_configuration_the_default_state_folder_names_the_agent(
    agent: Agent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    assert main(["drain"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    default = Path(line.partition("state_dir ")[2].partition(": ")[0])
    assert default.is_relative_to(tmp_path / "home")
    default.parent.mkdir(parents=True, exist_ok=True)
    default.symlink_to(tmp_path / "state")
    agent.respond("POST /v1/node/drain", {"status": "draining", "reasons": []})
    assert main(["drain"]) == 0
    assert capsys.readouterr().out == "the node is draining\n"
