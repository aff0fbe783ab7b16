"""The llama-server of one device or model."""

from pathlib import Path

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


def test_flags_are_not_checked_against_a_binary_that_will_not_get_them(tmp_path: Path) -> None:
    known = {"--threads": True}
    model = "models: [{model_id: a, path: a, server_args: {new_flag: 1}%s}]\n%s"
    for more, devices, count in (
        ("", "", 1),
        (", llama_server_bin: b", "", 0),
        ("", "devices: [{device_id: gpu:0, llama_server_bin: b}]\n", 0),
    ):
        config = parse_config(model % (more, devices), tmp_path / "node.yaml")
        assert len(unknown_to_binary(config, known)) == count
