"""The command line in a shell: readers that leave, users without a home, a demo beside which `status` works."""

import os
import pty
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fakes.agent_process import AgentProcess, assert_gone, running_agent, write_config

AGENT = [sys.executable, "-m", "nodeagent"]


@pytest.fixture(scope="module")
def config(llama_server: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = [{"model_id": "tiny", "path": str(tiny_model)}]
    return write_config(tmp_path_factory.mktemp("node"), llama_server, models)


@pytest.fixture(scope="module")
def agent(config: Path) -> Iterator[AgentProcess]:
    with running_agent(config) as agent:
        yield agent


def run(*argv: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*AGENT, *argv], capture_output=True, text=True, timeout=60, check=False, env=env)


def test_an_agent_whose_terminal_is_closed_ends_with_its_servers(
    llama_server: Path, tiny_model: Path, tmp_path: Path
) -> None:
    models = [{"model_id": "tiny", "path": str(tiny_model), "preload": True}]
    config = write_config(tmp_path, llama_server, models)
    keyboard, terminal = pty.openpty()
    # Its own session, whose terminal is that one, as a terminal emulator starts a shell.
    agent = subprocess.Popen(
        ["setsid", "--ctty", *AGENT, "--config", str(config)], stdin=terminal, stdout=terminal, stderr=terminal
    )
    os.close(terminal)
    try:
        shown = b""
        while b"is ready at" not in shown:
            shown += os.read(keyboard, 65536)
        children = psutil.Process(agent.pid).children(recursive=True)
        assert children
        os.close(keyboard)
        assert agent.wait(timeout=30) == 0
        assert_gone(children)
    finally:
        if agent.poll() is None:
            agent.kill()


def test_a_reader_that_leaves_ends_the_command_quietly(agent: AgentProcess, config: Path) -> None:
    script = f"{sys.executable} -m nodeagent events --config {config} | head -1; echo ${{PIPESTATUS[0]}}"
    # At once, though no further event is written for as long as nothing happens on the node.
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert done.stderr == ""
    [event, code] = done.stdout.splitlines()
    assert " node: " in event
    assert code == "141"


def test_events_without_follow_end(agent: AgentProcess, config: Path) -> None:
    done = run("events", "--no-follow", "--config", str(config))
    assert done.returncode == 0
    assert " node: ready" in done.stdout


def test_commands_find_their_agent_although_its_configuration_is_broken_by_now(
    agent: AgentProcess, config: Path
) -> None:
    good = config.read_text()
    config.write_text(good.replace('"models"', '"no_such_key": 1, "models"'))
    try:
        done = run("status", "--config", str(config))
    finally:
        config.write_text(good)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("test-node at http://127.0.0.1:")


@pytest.fixture
def readable_by_all() -> Iterator[Path]:
    """pytest's own folders are for its user alone."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


COMMANDS = [["status"], ["events"], ["drain"], ["check-config", "--config", "FILE"], ["--config", "FILE"]]


@pytest.mark.parametrize("argv", COMMANDS, ids=" ".join)
def test_a_user_without_a_home_gets_one_line_that_names_state_dir(argv: list[str], readable_by_all: Path) -> None:
    file = readable_by_all / "a.yaml"
    file.write_text("models: [{model_id: a, path: /a.gguf}]\n")
    file.chmod(0o644)
    # Without coverage in the process: that user can't write its file.
    without = ("HOME", "XDG_STATE_HOME", "STATE_DIRECTORY", "COVERAGE_PROCESS_CONFIG")
    env = {key: value for key, value in os.environ.items() if key not in without}
    command = [*AGENT, *(str(file) if word == "FILE" else word for word in argv)]
    # A user id that no passwd entry has.
    done = subprocess.run(
        ["setpriv", "--reuid", "12345", "--clear-groups", *command],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=env,
        cwd="/",
    )
    assert "Traceback" not in done.stderr
    assert done.returncode == 78, done.stderr
    [line] = [line for line in done.stderr.splitlines() if "state_dir" in line]
    assert "no home folder" in line
