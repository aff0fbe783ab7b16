"""The llama-server of one device or model."""

from pathlib import Path

import pytest

from nodeagent.config import host_problems, parse_config, unknown_to_binary


def test_a_binary_that_is_not_there_is_a_problem_with_its_key(tmp_path: Path) -> None:
    text = (
        "devices:\n- device_id: gpu:0\n- device_id: vulkan:0\n  llama_server_bin: bin/none\n"
        "models:\n- model_id: a\n  path: a.gguf\n  llama_server_bin: no-such-program\n"
    )
    problems = [str(problem) for problem in host_problems(parse_config(text, tmp_path / "node.yaml"))]
    assert f"{tmp_path}/node.yaml:4: devices[1].llama_server_bin: must be a program that can be run, found " in (
        "\n".join(problems)
    )
    assert any(": models[0].llama_server_bin: must be a program that can be run, found 'no-such" in p for p in problems)


NODES, NEW = {"--threads": True}, {"--threads": True, "--new-flag": True}


@pytest.mark.parametrize(
    ("of_model", "devices", "binary"),
    [
        ("", "", "the configured llama-server"),
        (", llama_server_bin: new", "", None),
        (", llama_server_bin: old", "", "old"),
        (", llama_server_bin: unknown", "", None),
        ("", "devices: [{device_id: gpu:0, llama_server_bin: new}]", None),
        ("", "devices: [{device_id: gpu:0, llama_server_bin: new}, {device_id: cpu:0, llama_server_bin: old}]", "old"),
        ("", "devices: [{device_id: gpu:0, llama_server_bin: new}, {device_id: cpu:0}]", "the configured llama-server"),
        (", llama_server_bin: new", "devices: [{device_id: cpu:0, llama_server_bin: old}]", None),
    ],
)
def test_flags_are_checked_against_the_binary_that_will_get_them(
    of_model: str, devices: str, binary: str | None, tmp_path: Path
) -> None:
    text = f"models: [{{model_id: a, path: a, server_args: {{new_flag: 1}}{of_model}}}]\n{devices}\n"
    known: dict[str | None, dict[str, bool]] = {None: NODES, "old": NODES, "new": NEW, "unknown": {}}
    problems = unknown_to_binary(parse_config(text, tmp_path / "node.yaml"), known.__getitem__)
    assert [problem.message for problem in problems] == ([f"is not a flag of {binary}"] if binary is not None else [])
