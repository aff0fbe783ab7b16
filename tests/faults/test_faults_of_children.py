"""Children that are killed, stopped, never ready, or crash on what they are asked."""

import http.server
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from fakes.agent_process import AgentProcess, assert_gone, running_agent, write_config

ANSWERS_AT_ONCE = {"backoff_initial_s": 0.05, "backoff_max_s": 0.05, "max_restarts": 1000}
HELLO: Any = [{"role": "user", "content": "hello there"}]
FAKE = Path(__file__).parent.parent / "fakes" / "faulty_server.py"

Times = Callable[[int], int]
Show = Callable[[str], None]


def body(number: int = 0, **more: Any) -> dict[str, Any]:
    """A request; each of another number is another body."""
    return {"model": "slow", "messages": HELLO, "max_tokens": 4, "seed": number, **more}


def post(agent: AgentProcess, content: dict[str, Any], timeout_s: float = 60) -> httpx.Response:
    return httpx.post(f"{agent.base_url}/v1/chat/completions", json=content, timeout=timeout_s, trust_env=False)


def get(agent: AgentProcess, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
    return httpx.get(agent.base_url + path, headers=headers, timeout=30, trust_env=False)


def ask_and_forget(agent: AgentProcess, content: dict[str, Any]) -> threading.Thread:
    def ask() -> None:
        with suppress(httpx.TransportError):  # the agent may end before it answers
            post(agent, content)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


@pytest.fixture
def slow_config(llama_server: Path, slow_model: Path, tmp_path: Path) -> Path:
    return write_config(
        tmp_path,
        llama_server,
        # One thread: with as many as CPUs, which wait for each other busily, a load takes many seconds on a busy host.
        [{"model_id": "slow", "path": str(slow_model), "threads": 1}],
        restart=ANSWERS_AT_ONCE,
    )


def test_a_stream_whose_server_is_killed_gets_an_error_event_within_a_second(
    slow_config: Path, times: Times, show: Show
) -> None:
    told_s, restarted_s = [], []
    with running_agent(slow_config) as agent:
        for number in range(times(100)):
            url = f"{agent.base_url}/v1/chat/completions"
            content = body(number, max_tokens=5000, stream=True)
            with httpx.stream("POST", url, json=content, timeout=60, trust_env=False) as answer:
                pieces = answer.iter_bytes()
                text = [next(pieces)]
                child = agent.wait_child()
                killed_at = time.monotonic()
                child.kill()
                with pytest.raises(httpx.RemoteProtocolError):
                    text.extend(pieces)
            told_s.append(time.monotonic() - killed_at)
            assert b"backend_crashed" in text[-1]
            assert b"[DONE]" not in b"".join(text)
            agent.wait_child(2.0, not_pid=child.pid)
            restarted_s.append(time.monotonic() - killed_at)
    assert max(told_s) < 1
    assert max(restarted_s) < 2
    show(
        f"{len(told_s)} streams killed: error after {statistics.median(told_s) * 1000:.0f} ms (max "
        f"{max(told_s) * 1000:.0f}), restart begun after {statistics.median(restarted_s) * 1000:.0f} ms (max "
        f"{max(restarted_s) * 1000:.0f})"
    )


def test_a_request_whose_server_is_killed_before_its_first_byte_succeeds(
    slow_config: Path, times: Times, show: Show
) -> None:
    with running_agent(slow_config) as agent:
        post(agent, body())
        for number in range(times(50)):
            child = agent.wait_child()
            used = child.cpu_times().user
            answered = threading.Event()

            def kill_at_work(
                child: psutil.Process = child, used: float = used, answered: threading.Event = answered
            ) -> None:
                while child.cpu_times().user - used < 0.05 and not answered.is_set():
                    time.sleep(0.005)
                child.kill()

            killer = threading.Thread(target=kill_at_work)
            killer.start()
            answer = post(agent, body(number, max_tokens=150))
            answered.set()
            killer.join()
            assert answer.status_code == 200, answer.text
            assert_gone([child])
        retried = sum("retrying once" in line["message"] for line in agent.lines)
        # A kill may also come when the answer is whole; then there is nothing to try again.
        assert retried >= times(50) / 2
    show(f"{times(50)} requests whose server was killed: all answered, {retried} of them by the one retry")


def test_a_stopped_server_is_unready_within_15_s_and_replaced_within_30_s(slow_config: Path, show: Show) -> None:
    with running_agent(slow_config) as agent:
        post(agent, body())
        child = agent.wait_child()
        stopped_at = time.monotonic()
        os.kill(child.pid, signal.SIGSTOP)
        agent.wait_for_line(lambda line: "is unhealthy" in line["message"], 15)
        unready_s = time.monotonic() - stopped_at
        left_s = 30 - unready_s
        agent.wait_for_line(lambda line: "is ready at" in line["message"] and line["generation"] == 2, left_s)
        show(f"stopped server: unready after {unready_s:.1f} s, replaced after {time.monotonic() - stopped_at:.1f} s")
        assert post(agent, body()).status_code == 200


def faulty(tmp_path: Path, model: Path, other: Path, llama_server: Path, behaviour: str, **keys: Any) -> Path:
    """A node of two devices whose server misbehaves for the model `bad`, and is llama-server for `good`."""
    wrapper = tmp_path / "server"
    wrapper.write_text(f'#!/bin/sh\ncase " $* " in *\' -a bad \'*) exec {FAKE} {behaviour} "$@";; esac\n')
    with wrapper.open("a") as file:
        file.write(f'exec {llama_server} "$@"\n')
    wrapper.chmod(0o755)
    models = [{"model_id": "bad", "path": str(model)}, {"model_id": "good", "path": str(other)}]
    devices = [{"device_id": "cpu:0"}, {"device_id": "cpu:1"}]
    return write_config(tmp_path, wrapper, models, devices=devices, **keys)


def spawns(agent: AgentProcess, child: str = "/bad") -> int:
    return sum(f"{child} is starting" in line["message"] for line in agent.lines)


def test_a_server_that_exits_at_once_is_told_at_once_started_four_times_and_then_failed(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, tmp_path: Path, show: Show
) -> None:
    config = faulty(tmp_path, tiny_model, tiny_model_b, llama_server, "exit")
    with running_agent(config) as agent:
        began = time.monotonic()
        answer = post(agent, body(model="bad"), 10)
        told_s = time.monotonic() - began
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "backend_unavailable")
        assert "exited with code 3" in answer.json()["error"]["message"]
        assert told_s < 5
        agent.wait_for_line(lambda line: "cpu:0/bad has failed" in line["message"], 30)
        assert spawns(agent, "cpu:0/bad") == 4
        assert post(agent, body(model="good")).status_code == 200
        ready = get(agent, "/readyz")
        assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
        assert "exited with code 3" in ready.json()["reasons"][0]
        inventory = get(agent, "/v1/node/inventory", headers=agent.operator_headers()).json()
        [bad] = [server for server in inventory["devices"][0]["servers"] if server["state"] == "failed"]
        assert bad["model_id"] == "bad"
        assert "the last words" in bad["reason"]
        assert 0 < bad["ready_in_s"] <= 60
        show(f"exits at once: told after {told_s * 1000:.0f} ms, 4 spawns, then failed; the other model serves")


def test_a_server_that_is_never_ready_is_a_typed_error_at_the_timeout(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, tmp_path: Path, show: Show
) -> None:
    config = faulty(
        tmp_path,
        tiny_model,
        tiny_model_b,
        llama_server,
        "never-ready",
        llama_server_startup_timeout_s=1,
        llama_server_startup_limit_s=2,
    )
    with running_agent(config) as agent:
        began = time.monotonic()
        answer = post(agent, body(model="bad"), 10)
        told_s = time.monotonic() - began
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "model_loading")
        assert 0.9 < told_s < 3
        assert post(agent, body(model="good")).status_code == 200
        line = agent.wait_for_line(lambda line: "/bad has failed" in line["message"], 60)
        assert "not ready 2 s after its spawn" in line["message"]
        assert spawns(agent) == 4
        show(f"never ready: typed error after {told_s:.1f} s of a 1 s time-out, 4 spawns, then failed; others serve")


def test_one_body_that_crashes_its_server_crashes_two_and_no_more(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, tmp_path: Path, show: Show
) -> None:
    config = faulty(tmp_path, tiny_model, tiny_model_b, llama_server, "crash-on-chat", restart=ANSWERS_AT_ONCE)
    with running_agent(config) as agent:
        codes = [post(agent, body(model="bad")).status_code for _ in range(20)]
        assert set(codes) == {502}
        crashed = sum("/bad ended: exited with code 9" in line["message"] for line in agent.lines)
        assert 1 <= crashed <= 2
        assert post(agent, body(model="good")).status_code == 200
        show(f"one body that crashes its server, sent 20 times: {crashed} servers crashed")


def test_a_server_that_hangs_at_work_is_replaced_though_it_answers_health(
    llama_server: Path, tiny_model: Path, tiny_model_b: Path, tmp_path: Path, show: Show
) -> None:
    config = faulty(
        tmp_path, tiny_model, tiny_model_b, llama_server, "hang-on-chat", stall_timeout_s=5, shutdown_timeout_s=0
    )
    with running_agent(config) as agent:
        began = time.monotonic()
        asking = ask_and_forget(agent, body(model="bad"))
        line = agent.wait_for_line(lambda line: "is unhealthy" in line["message"], 30)
        assert "no sign of progress" in line["message"]
        show(f"hangs at work, healthy: replaced after {time.monotonic() - began:.0f} s of a 5 s stall_timeout_s")
        agent.signal(signal.SIGINT)
        agent.wait_exit()
        asking.join()


def prompt(word: str, count: int) -> dict[str, Any]:
    return body(model="smollm2", messages=[{"role": "user", "content": word * count}])


def test_a_long_prompt_evaluation_is_no_stall(llama_server: Path, smollm2: Path, tmp_path: Path, show: Show) -> None:
    model = {"model_id": "smollm2", "path": str(smollm2), "ctx_size": 8192, "threads": 1}
    with running_agent(write_config(tmp_path, llama_server, [model], stall_timeout_s=4)) as agent:
        post(agent, prompt("seven ", 1), 60)  # loads the model
        # Machines differ tenfold: a prompt that takes some 15 s here, within the context.
        began = time.monotonic()
        post(agent, prompt("nine ", 300), 120)
        count = min(7000, int(300 * 15 / (time.monotonic() - began)))
        began = time.monotonic()
        answer = post(agent, prompt("three ", count), 300)
        took_s = time.monotonic() - began
        assert answer.status_code == 200, answer.text
        assert took_s > 10, "too quick to have looked like a stall"
        assert spawns(agent, "/smollm2") == 1
        show(
            f"{answer.json()['usage']['prompt_tokens']} tokens of prompt took {took_s:.0f} s without a byte, under a "
            "stall_timeout_s of 4 s: no false alarm"
        )


def test_a_stranger_on_a_port_that_a_child_had_is_never_served_from(slow_config: Path, show: Show) -> None:
    with running_agent(slow_config) as agent:
        post(agent, body())
        child = agent.wait_child()
        [port] = [it.laddr.port for it in child.net_connections("tcp") if it.status == "LISTEN"]
        child.kill()
        assert_gone([child])
        with Stranger(port) as stranger:
            assert post(agent, body()).json()["model"] == "slow"
            assert agent.wait_child().pid != child.pid
            assert stranger.asked == 0
    show("a stranger on the child's old port: never asked")


class Stranger:
    """Takes a port and counts who comes; answers everything with 200."""

    def __init__(self, port: int) -> None:
        outer = self
        self.asked = 0

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked += 1
                content = json.dumps({"status": "ok"}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                return

        self._server = _listening(port, Handler)
        self._thread = threading.Thread(target=self._server.serve_forever)

    def __enter__(self) -> "Stranger":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _listening(port: int, handler: type[http.server.BaseHTTPRequestHandler]) -> http.server.HTTPServer:
    """Take the port as soon as the kernel is done with the dead child's connections."""
    until = time.monotonic() + 5
    while True:
        try:
            return http.server.HTTPServer(("127.0.0.1", port), handler)
        except OSError:
            assert time.monotonic() < until, "the port stays taken"
            time.sleep(0.05)
