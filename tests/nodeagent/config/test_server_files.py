"""Flags whose value is a file: resolved like `path`, and checked on the host."""

from pathlib import Path

import pytest

from nodeagent.config import host_problems, parse_config
from nodeagent.config.server_flags import FileArg, FlagValue, file_args
from nodeagent.errors import ConfigError

FILE = Path("/etc/node/agent.yaml")


@pytest.mark.parametrize(
    ("name", "value", "files"),
    [
        ("lora", "a.gguf", [FileArg("a.gguf")]),
        ("lora", "a.gguf,b.gguf", [FileArg("a.gguf"), FileArg("b.gguf")]),
        ("lora", ("a.gguf", "b.gguf"), [FileArg("a.gguf"), FileArg("b.gguf")]),
        ("lora_scaled", "a.gguf:0.5,b.gguf:2", [FileArg("a.gguf", ":0.5"), FileArg("b.gguf", ":2")]),
        ("lora-scaled", "a.gguf", [FileArg("a.gguf")]),
        ("md", "draft.gguf", [FileArg("draft.gguf")]),
        ("chat_template_file", "with,comma.jinja", [FileArg("with,comma.jinja")]),
        ("temp", 0.5, []),
        ("mmproj", None, []),
        ("unknown-flag", "a.gguf", []),
    ],
)
def test_the_files_of_a_flag_are_found(name: str, value: FlagValue, files: list[FileArg]) -> None:
    assert file_args(name, value) == files


@pytest.mark.parametrize(
    ("flag", "resolved"),
    [
        ("lora: a.gguf", "/etc/node/a.gguf"),
        ("lora: /srv/a.gguf", "/srv/a.gguf"),
        ("lora_scaled: 'a.gguf:0.5,../b.gguf:1'", "/etc/node/a.gguf:0.5,/etc/b.gguf:1"),
        ("lora: [a.gguf, b.gguf]", ("/etc/node/a.gguf", "/etc/node/b.gguf")),
        ("mmproj: ~/p.gguf", str(Path("~/p.gguf").expanduser())),
        ("lookup_cache_dynamic: cache.bin", "/etc/node/cache.bin"),
        ("override_kv: a=int:1", "a=int:1"),
    ],
)
def test_a_file_is_resolved_like_the_path_of_a_model(flag: str, resolved: FlagValue) -> None:
    config = parse_config(f"models: [{{model_id: a, path: a.gguf, server_args: {{{flag}}}}}]", FILE)

    [value] = config.models[0].server_args.values()
    assert value == resolved


def test_a_missing_file_is_a_problem_of_the_host_with_its_flag(tmp_path: Path) -> None:
    (tmp_path / "there.gguf").touch()
    text = (
        "backend: cpu\nllama_server_bin: /bin/true\nmodels:\n  - model_id: a\n    path: a.gguf\n    server_args:\n"
        "      lora: [there.gguf, missing.gguf]\n      lookup_cache_dynamic: new.bin\n"
    )
    config = parse_config(text, tmp_path / "agent.yaml")

    found = [str(problem) for problem in host_problems(config) if "server_args" in problem.where]
    assert found == [
        f"{tmp_path}/agent.yaml:7: models[0].server_args.lora: can't be used: {tmp_path}/missing.gguf: "
        "No such file or directory"
    ]


@pytest.mark.parametrize(
    "flag",
    [
        "tools: all",
        "mcp_servers_config: a.json",
        "media_path: /",
        "cors_origins: '*'",
        "sleep_idle_seconds: 60",
        "log_file: a.log",
        "agent: true",
        "ui_mcp_proxy: true",
        "props: true",
        "api_key: abc",
        "models_dir: /srv",
        "log-prompts-dir: /tmp",
    ],
)
def test_a_flag_that_opens_a_door_is_refused_with_the_reason(flag: str) -> None:
    with pytest.raises(ConfigError, match="is reserved for the agent: ") as refused:
        parse_config(f"models: [{{model_id: a, path: a.gguf, server_args: {{{flag}}}}}]", FILE)
    assert len(refused.value.problems) == 1
