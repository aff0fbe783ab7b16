"""What happens to the agent itself, and around it: killed, its log blocked, its disk full, two on one host."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from fakes.agent_process import AgentProcess, assert_gone, running_agent, write_config

HELLO: Any = [{"role": "user", "content": "hello there"}]
FAKE = Path(__file__).parent.parent / "fakes" / "faulty_server.py"

Times = Callable[[int], int]
Show = Callable[[str], None]


def post(agent: AgentProcess, model: str, tokens: int = 2) -> httpx.Response:
    body = {"model": model, "messages": HELLO, "max_tokens": tokens}
    return httpx.post(f"{agent.base_url}/v1/chat/completions", json=body, timeout=60, trust_env=False)


def ask_and_forget(agent: AgentProcess, model: str, tokens: int) -> threading.Thread:
    def ask() -> None:
        try:
            post(agent, model, tokens)
        except httpx.TransportError:
            return  # the agent is about to be killed

    thread = threading.Thread(target=ask)
    thread.start()
    return thread


@pytest.mark.parametrize("moment", ["loading", "serving", "swapping"])
def test_no_child_outlives_an_agent_that_is_killed(
    moment: str, llama_server: Path, slow_model: Path, smollm2: Path, tmp_path: Path, times: Times, show: Show
) -> None:
    models = [{"model_id": "slow", "path": str(slow_model)}, {"model_id": "smollm2", "path": str(smollm2)}]
    longest_s = 0.0
    for number in range(times(20)):
        config = write_config(tmp_path / str(number), llama_server, models)
        with running_agent(config) as agent:
            if moment != "loading":
                post(agent, "slow")
            asking = ask_and_forget(agent, "slow" if moment == "serving" else "smollm2", 2000)
            if moment == "serving":
                time.sleep(0.1)
            else:
                agent.wait_for_line(lambda line: "smollm2 is starting" in line["message"])
            agent.wait_child()
            children = agent.children()
            killed_at = time.monotonic()
            agent.signal(signal.SIGKILL)
            assert_gone(children, 1.0)
            longest_s = max(longest_s, time.monotonic() - killed_at)
            agent.wait_exit()
            asking.join()
    show(f"agent killed while {moment}, {times(20)} times: no child left after {longest_s * 1000:.0f} ms at most")


def test_two_agents_side_by_side_leave_each_other_alone(
    llama_server: Path, tiny_model: Path, tmp_path: Path, show: Show
) -> None:
    models = [{"model_id": "tiny", "path": str(tiny_model)}]
    config_a = write_config(tmp_path / "a", llama_server, models)
    config_b = write_config(tmp_path / "b", llama_server, models)
    with running_agent(config_b) as other:
        post(other, "tiny")
        child = other.wait_child()
        for _ in range(2):
            with running_agent(config_a) as agent:
                post(agent, "tiny")
                children = agent.children()
                agent.signal(signal.SIGKILL)
                agent.wait_exit()
                assert_gone(children)
        with running_agent(config_a) as agent:
            assert post(agent, "tiny").status_code == 200
        argv = [sys.executable, "-m", "nodeagent", "--config", str(config_b)]
        second = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
        assert second.returncode == 1
        assert len(second.stderr.splitlines()) == 1
        assert f"is in use by another agent (pid {other.process.pid})" in second.stderr
        assert other.wait_child().pid == child.pid
        assert post(other, "tiny").status_code == 200
    show("two agents, one killed twice and started again, a second on the other's folder: the other's child untouched")


def test_a_child_of_a_killed_agent_that_got_away_is_ended_by_the_next_start(
    llama_server: Path, tiny_model: Path, tmp_path: Path, show: Show
) -> None:
    config = write_config(tmp_path, llama_server, [{"model_id": "tiny", "path": str(tiny_model)}])
    with running_agent(config) as agent:
        post(agent, "tiny")
        record = (tmp_path / "state" / "children.json").read_text()
        agent.signal(signal.SIGKILL)
        agent.wait_exit()
    # What the parent-death signal can't do elsewhere: a process as the one recorded is still there.
    runaway = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"], process_group=0)
    started_at = psutil.Process(runaway.pid).create_time()
    argv = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    [old] = json.loads(record)
    (tmp_path / "state" / "children.json").write_text(
        json.dumps([old, {"pid": runaway.pid, "started_at": started_at, "argv": argv}])
    )
    with running_agent(config) as agent:
        assert runaway.wait(5) == -signal.SIGKILL
        assert any("left behind by an earlier run" in line["message"] for line in agent.lines)
        assert post(agent, "tiny").status_code == 200
    show("a recorded process of a dead agent: ended by the next start")


@pytest.mark.parametrize(
    ("behaviour", "output"), [("flood", "GiB without a newline"), ("flood-lines", "x 0.5 MiB of lines")]
)
def test_much_output_and_a_log_that_nobody_reads_harm_nothing(
    behaviour: str, output: str, tiny_model: Path, tmp_path: Path, times: Times, show: Show
) -> None:
    wrapper = tmp_path / "server"
    wrapper.write_text(f'#!/bin/sh\nexec {FAKE} {behaviour} "$@"\n')
    wrapper.chmod(0o755)
    config = write_config(tmp_path, wrapper, [{"model_id": "tiny", "path": str(tiny_model)}])
    argv = [sys.executable, "-m", "nodeagent", "--config", str(config), "--log-format", "json"]
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as process:  # its stderr is a pipe that is never read
        try:
            base_url = wait_for_address(tmp_path / "state" / "address")
            memory = psutil.Process(process.pid)
            before = memory.memory_info().rss
            flooding = [threading.Thread(target=flood, args=(base_url,)) for _ in range(times(10))]
            for thread in flooding:
                thread.start()
            latencies_s: list[float] = []
            with httpx.Client(base_url=base_url, timeout=30, trust_env=False) as http:
                while any(thread.is_alive() for thread in flooding) or len(latencies_s) < 100:
                    began = time.monotonic()
                    assert http.get("/livez").status_code == 200
                    latencies_s.append(time.monotonic() - began)
                    time.sleep(0.005)
            p99_s = sorted(latencies_s)[int(len(latencies_s) * 0.99)]
            grown = memory.memory_info().rss - before
            show(
                f"{times(10)} {output}, log blocked: p99 of /livez {p99_s * 1000:.0f} ms over {len(latencies_s)}, "
                f"memory grew by {grown / 2**20:.0f} MiB"
            )
            assert p99_s < 0.1
            assert grown < 100 * 2**20
        finally:
            process.kill()


def wait_for_address(path: Path) -> str:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if path.exists() and (said := path.read_text().strip()):
            try:
                httpx.get(f"{said}/livez", timeout=5, trust_env=False)
            except httpx.TransportError:
                time.sleep(0.05)
            else:
                return said
        time.sleep(0.05)
    raise AssertionError("the agent did not come up")


def flood(base_url: str) -> None:
    body = {"model": "tiny", "messages": HELLO}
    httpx.post(f"{base_url}/v1/chat/completions", json=body, timeout=120, trust_env=False)


FAKE_WALL_CLOCK = """
import os, pathlib, time

real, offset = time.time, pathlib.Path(os.environ["WALL_CLOCK_OFFSET"])
time.time = lambda: real() + float(offset.read_text())
time.time_ns = lambda: int(time.time() * 1e9)
"""


def test_a_wall_clock_that_is_set_back_and_forth_restarts_nothing(
    llama_server: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, show: Show
) -> None:
    offset = tmp_path / "offset"
    offset.write_text("0")
    (tmp_path / "sitecustomize.py").write_text(FAKE_WALL_CLOCK)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("WALL_CLOCK_OFFSET", str(offset))
    models = [{"model_id": "tiny", "path": str(tiny_model)}]
    with running_agent(write_config(tmp_path, llama_server, models, stall_timeout_s=6)) as agent:
        post(agent, "tiny")
        child = agent.wait_child()
        for days in (400, -400, 0, 4000):
            # In one go, as far as a reader can see: the agent looks at it all the time.
            (tmp_path / "new").write_text(str(days * 86400))
            (tmp_path / "new").replace(offset)
            assert post(agent, "tiny").status_code == 200
            time.sleep(3)  # so that between the first and the last each watch has looked more than once
        years = {line["time"][:4] for line in agent.lines if "time" in line}
        assert len(years) >= 3, "the agent saw no other clock"
        assert agent.wait_child().pid == child.pid
        assert httpx.get(f"{agent.base_url}/readyz", timeout=30, trust_env=False).json()["status"] == "ready"
        assert sum("is starting, pid" in line["message"] for line in agent.lines) == 1
    show("wall clock set forth and back by years, four times: nothing restarted")


def test_idle_clients_beyond_the_descriptors_end_no_stream_and_shut_nobody_out(
    llama_server: Path, tiny_model: Path, slow_model: Path, tmp_path: Path, show: Show
) -> None:
    models = [{"model_id": "tiny", "path": str(tiny_model)}, {"model_id": "slow", "path": str(slow_model)}]
    with running_agent(write_config(tmp_path, llama_server, models)) as agent, ExitStack() as idle:
        resource.prlimit(agent.process.pid, resource.RLIMIT_NOFILE, (200, 200))
        address = ("127.0.0.1", int(agent.base_url.rpartition(":")[2]))
        body = {"model": "slow", "messages": HELLO, "max_tokens": 100, "stream": True}
        url = f"{agent.base_url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=120, trust_env=False) as stream:
            pieces = stream.iter_text()
            received = next(pieces)
            child = agent.wait_child()
            for _ in range(400):
                idle.enter_context(socket.create_connection(address, timeout=30))
            assert httpx.get(f"{agent.base_url}/livez", timeout=30, trust_env=False).status_code == 200
            received += "".join(pieces)
        assert received.endswith("data: [DONE]\n\n")
        assert agent.wait_child().pid == child.pid
        assert post(agent, "slow").status_code == 200
        open_now = psutil.Process(agent.process.pid).num_fds()
        assert 100 < open_now <= 160, "a reserve of 50 is kept, and the rest may be used"
        child.kill()
        assert_gone([child])
        assert post(agent, "tiny").status_code == 200
        about_it = [line["message"] for line in agent.lines if "descriptors" in line["message"]]
        assert len(about_it) == 1, about_it
        assert not [line for line in agent.lines if "Traceback" in str(line)]
    show(f"400 idle clients under a limit of 200 descriptors, {open_now} of them in use: a stream went on, all served")


def fill(path: Path) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(file, b"x" * 1024)
    finally:
        os.close(file)


def fill_again(folder: Path) -> None:
    """Take what became free since it was filled."""
    with suppress(OSError):
        fill(folder / "more ballast")


@pytest.mark.skipif(os.geteuid() != 0, reason="hardware: mounting a small disk takes root")
def test_a_full_disk_costs_a_warning_and_serving_goes_on(
    llama_server: Path, tiny_model: Path, tmp_path: Path, show: Show
) -> None:
    state = tmp_path / "state"
    state.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(state)], check=False)
    if mounted.returncode != 0:
        pytest.skip("hardware: no tmpfs can be mounted here")
    try:
        config = write_config(tmp_path, llama_server, [{"model_id": "tiny", "path": str(tiny_model)}])
        with running_agent(config) as agent:
            with pytest.raises(OSError, match="No space"):
                fill(state / "ballast")
            assert post(agent, "tiny").status_code == 200
            agent.wait_for_line(lambda line: "can't be recorded" in line["message"])
            assert post(agent, "tiny").status_code == 200
        (state / "address").unlink()
        fill_again(state)
        with running_agent(config) as agent:
            assert post(agent, "tiny").status_code == 200
            show("disk full for the state file: a warning, and requests are served, after a start too")
            (state / "ballast").unlink()
    finally:
        subprocess.run(["umount", "-l", str(state)], check=True)
