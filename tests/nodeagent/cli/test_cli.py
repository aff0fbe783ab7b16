"""The command line: the exit codes, and what `check-config` prints."""

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nodeagent import agent
from nodeagent.cli.main import main
from nodeagent.config import NodeConfig
from nodeagent.errors import ConfigError, EndedAtOnce, Problem, StartupError

pytestmark = pytest.mark.real

SMI = "#!/bin/sh\necho '0, GPU-6f1c2d3e, NVIDIA L4, 23034, 22000, 1034, 0, 40, 20.00'\n"


def run(*argv: str, **env: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the agent's command line."""
    done = subprocess.run(
        [sys.executable, "-m", "nodeagent", *argv],
        env={**os.environ, **env},
        capture_output=True,
        check=False,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout, done.stderr


def check(folder: Path, text: str, **env: str) -> tuple[int, str, str]:
    config = folder / "node.yaml"
    config.write_text(text)
    return run("check-config", "--config", str(config), **env)


# --- Exit codes -------------------------------------------------------------------------------------------------


def test_a_command_that_did_its_work_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out)["type"] == "object"


@pytest.mark.parametrize("argv", [[], ["check-config"]], ids=["daemon", "check"])
def test_no_configuration_is_exit_code_1_with_the_way_out(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    expected = "rolemesh-node-agent: no configuration: give --config FILE, or try the command 'demo'\n"
    assert capsys.readouterr() == ("", expected)


# A shell starts its background jobs with SIGINT ignored, and Python leaves that as it is.
WITH_CTRL_C = """
import signal, sys
from nodeagent.cli.main import main

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main(sys.argv[1:]))
"""


def test_a_command_that_ctrl_c_ends_exits_with_130_without_a_traceback(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "admin.token").write_text("token\n")
    config = tmp_path / "node.yaml"
    config.write_text(f"state_dir: {tmp_path}\nmodels: [{{model_id: a, path: {tiny_model}}}]\n")
    command = [sys.executable, "-c", WITH_CTRL_C, "status", "--config", str(config)]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        (tmp_path / "address").write_text(f"http://127.0.0.1:{silent.getsockname()[1]}\n")
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as running:
            connection, _address = silent.accept()
            with connection:
                assert connection.recv(4).startswith(b"GET")
                time.sleep(0.2)  # until it waits for the response: a signal just before that would be noticed only then
                running.send_signal(signal.SIGINT)
                output, _ = running.communicate(timeout=30)
    assert output == b""
    assert running.returncode == 130


@pytest.mark.parametrize(
    "argv", [["serve"], ["--port", "1"], ["--log-level", "loud"], ["demo", "--port", "x"], ["load"]], ids=" ".join
)
def test_a_command_line_that_can_not_be_read_is_exit_code_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(argv)
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("usage: rolemesh-node-agent")


@pytest.mark.parametrize("command", [[], ["check-config"], ["status"]], ids=["daemon", "check", "status"])
@pytest.mark.parametrize("text", [None, "models: [", "modles: []"], ids=["missing", "no YAML", "unknown key"])
def test_a_wrong_configuration_is_exit_code_78(
    command: list[str], text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "node.yaml"
    if text is not None:
        config.write_text(text)
    assert main([*command, "--config", str(config)]) == 78
    assert str(config) in capsys.readouterr().err


@pytest.fixture
def logging_restored() -> Iterator[None]:
    """The daemon's logging is set for the whole process; later tests read what is logged at the level of before."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers = handlers
    logging.captureWarnings(False)


CONFIG_ERROR = ConfigError([Problem("no such device", "backend")])


@pytest.fixture
def ctrl_c_restored() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (None, 0, ""),
        (CONFIG_ERROR, 78, "backend: no such device"),
        (StartupError("the port is taken"), 1, "the port is taken"),
        (RuntimeError("a bug"), 1, "the agent failed"),
        (EndedAtOnce(signal.SIGTERM), 143, ""),
    ],
    ids=["stopped by a signal", "configuration", "start", "bug", "second signal"],
)
@pytest.mark.usefixtures("logging_restored", "ctrl_c_restored")
def test_the_way_in_which_the_daemon_ends_decides_its_exit_code(
    failure: Exception | None,
    code: int,
    said: str,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def run_until_it_ends(_config: NodeConfig, *, on_ready: Callable[[str], None]) -> None:
        if failure is not None:
            raise failure

    monkeypatch.setattr(agent, "run", run_until_it_ends)
    config = tmp_path / "node.yaml"
    config.write_text(f"state_dir: {tmp_path}\nmodels: [{{model_id: a, path: {tiny_model}}}]\n")
    assert main(["--config", str(config)]) == code
    output = capfd.readouterr()
    assert said in output.out + output.err
    assert ("Traceback" in output.out + output.err) is (code == 1 and isinstance(failure, RuntimeError))


# --- check-config -----------------------------------------------------------------------------------------------


def test_check_config_prints_the_command_of_each_model_on_each_device(tiny_model: Path, tmp_path: Path) -> None:
    models = f"models: [{{model_id: tiny, path: {tiny_model}, server_args: {{cache_type_k: q8_0}}}}]\n"
    code, out, err = check(tmp_path, models + "devices: [{device_id: 'cpu:0'}, {device_id: 'cpu:1', threads: 3}]\n")
    assert (code, err) == (0, "")
    first, second = out.split("\n\n")[-2:]  # before them, the limits of this process if it has any
    assert first.startswith("# tiny on cpu:0 ")
    assert "LLAMA_API_KEY=*** " in first
    assert f" -m {tiny_model} -a tiny --host 127.0.0.1 --port 0 " in first
    assert "-t 3" not in first
    assert second.startswith("# tiny on cpu:1 ")
    assert " -t 3 " in second
    assert " --cache-type-k q8_0" in second


def test_check_config_says_how_many_cpus_the_servers_may_use_and_gives_them_as_many_threads(
    tiny_model: Path, tmp_path: Path
) -> None:
    host, mine = os.cpu_count() or 1, os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    try:
        code, out, err = check(tmp_path, f"models: [{{model_id: tiny, path: {tiny_model}}}]\nbackend: cpu\n")
    finally:
        os.sched_setaffinity(0, mine)
    assert (code, err) == (0, "")
    # On a host with one CPU that is no limit.
    assert (f"# 1 of {host} CPUs: " in out and "affinity 1\n" in out) is (host > 1)
    assert (" -t 1 -tb 1 " in out) is (host > 1)


def test_check_config_says_all_that_is_wrong_with_the_file_and_with_the_host(tmp_path: Path) -> None:
    text = "llama_server_bin: /none\nmodels:\n- {model_id: a, path: /none.gguf}\nbackend: cuda\n"
    code, out, err = check(tmp_path, text, CUDA_VISIBLE_DEVICES="")
    file = tmp_path / "node.yaml"
    assert (code, out) == (78, "")
    binary, model, backend = err.splitlines()
    assert binary.startswith(f"{file}:1: llama_server_bin: must be a program")
    assert model.startswith(f"{file}:3: models[0].path: can't be used")
    assert backend.startswith(f"{file}:4: backend: ")


def test_a_missing_binary_is_reported_once(tiny_model: Path, tmp_path: Path) -> None:
    code, out, err = check(tmp_path, f"llama_server_bin: /none\nmodels: [{{model_id: a, path: {tiny_model}}}]\n")
    assert (code, out) == (78, "")
    [line] = err.splitlines()
    assert line.startswith(f"{tmp_path / 'node.yaml'}:1: llama_server_bin: must be a program")


def test_a_gpu_on_a_host_without_any_is_a_fault_of_the_devices(tiny_model: Path, tmp_path: Path) -> None:
    text = f"devices: [{{device_id: 'gpu:0'}}]\nmodels: [{{model_id: a, path: {tiny_model}}}]\n"
    code, out, err = check(tmp_path, text, CUDA_VISIBLE_DEVICES="")
    assert (code, out) == (78, "")
    [line] = err.splitlines()
    assert line.startswith(f"{tmp_path / 'node.yaml'}:1: devices: ")


def test_check_config_warns_of_a_model_that_fits_on_no_device_with_the_figures(
    tiny_model: Path, tmp_path: Path
) -> None:
    text = f"""backend: cpu
models:
  - {{model_id: small, path: {tiny_model}}}
  - {{model_id: large, path: {tiny_model}, ctx_size: 2000000000}}
"""
    code, out, err = check(tmp_path, text)
    assert code == 0
    assert " -c 2000000000 " in out
    [warning] = [line for line in err.splitlines() if "fits on no device" in line]
    assert re.fullmatch(
        rf"warning: {tmp_path}/node.yaml:4: models\[1\]: fits on no device: cpu:0: needs about [\d.]+ GiB "
        r"\(476\.8 GiB of KV cache \+ [\d.]+ GiB of compute buffer\), and the device has [\d.]+ [GM]iB",
        warning,
    ), warning


@pytest.mark.parametrize("command", [["check-config"], []], ids=["check", "daemon"])
def test_a_gpu_that_is_not_among_those_of_the_host_is_named_with_its_line(
    command: list[str], tiny_model: Path, tmp_path: Path
) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(SMI)
    smi.chmod(0o755)
    config = tmp_path / "node.yaml"
    config.write_text(
        f"listen_port: 0\nstate_dir: {tmp_path / 'state'}\nmodels: [{{model_id: a, path: {tiny_model}}}]\n"
        "backend: cuda\ndevices:\n- device_id: gpu:0\n- device_id: gpu:99\n"
    )
    # Where there is a real driver, it has no such GPU either.
    code, out, err = run(*command, "--config", str(config), PATH=f"{smi.parent}:{os.environ['PATH']}")
    assert (code, out) == (78, "")
    line = err.splitlines()[-1]  # what comes before it is of the driver: that there is no NVML
    assert line.startswith(f"{config}:7: devices[1].device_id: the backend cuda has no 'gpu:99' here; it has gpu:0")
