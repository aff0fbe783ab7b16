"""What the configured binary accepts, by its own help."""

from pathlib import Path

import pytest

from nodeagent.cli.main import main
from nodeagent.config import parse_config, parse_help, unknown_to_binary, with_keys
from nodeagent.config.server_flags import FlagValue
from nodeagent.llama_server.binary_help import read_help

FLAGS = {"--mlock": False, "-c": True, "--ctx-size": True, "--temp": True, "--offline": True}


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("mlokc: true", "is not a flag of the configured llama-server; did you mean mlock?"),
        ("zzzzzz: true", "is not a flag of the configured llama-server"),
        ("offline: true", "needs a value with the configured llama-server, found true"),
        ("mlock: ['on']", "takes no value with the configured llama-server, found ('on',); write true to set the flag"),
    ],
)
def test_a_flag_that_the_binary_would_refuse_is_a_problem_at_its_line(flag: str, message: str) -> None:
    name = flag.partition(":")[0]
    text = f"models:\n  - model_id: a\n    path: a.gguf\n    server_args:\n      temp: 1\n      {name}: null\n"
    config = parse_config(text, Path("/etc/node/agent.yaml"))
    value: FlagValue = True if flag.endswith("true") else ("on",)
    model = config.models[0].model_copy(update={"server_args": {"temp": 1, name: value}})
    changed = with_keys(config, {"models": (model,)})

    [problem] = unknown_to_binary(changed, lambda _binary: FLAGS)

    assert (problem.line, problem.where, problem.message) == (6, f"models[0].server_args.{name}", message)


def test_without_a_help_text_nothing_is_refused() -> None:
    config = parse_config("models: [{model_id: a, path: a.gguf, server_args: {zzzz: 1}}]", Path("/a.yaml"))

    assert parse_help("usage: some wrapper\n--verbose\n") == {}
    assert unknown_to_binary(config, lambda _binary: {}) == []


@pytest.mark.real
def test_a_binary_that_is_missing_gives_no_help(tmp_path: Path) -> None:
    assert read_help(tmp_path / "nothing") == ""


def test_the_real_servers_help_is_understood(llama_server: Path) -> None:
    flags = parse_help(read_help(llama_server))

    assert len(flags) > 300
    assert flags["--ctx-size"] is True
    assert flags["-c"] is True
    assert flags["--no-mmap"] is False


def test_check_config_asks_the_configured_binary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: Path, llama_server: Path
) -> None:
    config = tmp_path / "agent.yaml"
    config.write_text(
        f"backend: cpu\nllama_server_bin: {llama_server}\n"
        f"models: [{{model_id: a, path: {tiny_model}, server_args: {{no_warmpu: true}}}}]\n"
    )

    assert main(["check-config", "--config", str(config)]) == 78
    assert "is not a flag of the configured llama-server; did you mean no-warmup?" in capsys.readouterr().err


def test_check_config_asks_the_binary_of_a_model_and_of_a_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: Path, llama_server: Path
) -> None:
    help_text = "".join(f"--flag-{number}  a flag\n" for number in range(30)) + "--new-flag N  a new one\n"
    own = tmp_path / "new-llama-server"
    own.write_text(f"#!/bin/sh\ncat <<EOF\n{help_text}EOF\n")
    own.chmod(0o755)
    config = tmp_path / "agent.yaml"
    config.write_text(
        f"backend: cpu\nllama_server_bin: {llama_server}\nmodels:\n"
        f"- {{model_id: a, path: {tiny_model}, llama_server_bin: {own}, server_args: {{new_flag: 1}}}}\n"
        f"- {{model_id: b, path: {tiny_model}, llama_server_bin: {own}, server_args: {{flag_3: 1}}}}\n"
        f"- {{model_id: c, path: {tiny_model}, server_args: {{new_flag: 1}}}}\n"
    )

    assert main(["check-config", "--config", str(config)]) == 78
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(
        f":5: models[1].server_args.flag_3: takes no value with {own}, found 1; write true to set the flag"
    )
    assert [
        f"{config}:6: models[2].server_args.new_flag: is not a flag of the configured llama-server" in lines[1]
    ] == [True]
    assert len(lines) == 2
