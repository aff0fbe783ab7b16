from pathlib import Path

import pytest

from nodeagent.cli.main import main
from nodeagent.config import parse_config
from nodeagent.config.retired import without_retired
from nodeagent.errors import ConfigError

FILE = Path("/etc/node/agent.yaml")
MODELS = "models: [{model_id: a, path: a.gguf}]\n"


def test_a_retired_key_is_a_warning_with_file_line_and_key() -> None:
    config = parse_config(f"node_id: box\nresidency_linger_s: 0.05\n{MODELS}", FILE)

    assert [str(warning) for warning in config.source.warnings] == [
        f"{FILE}:2: residency_linger_s: no longer has any effect; remove it"
    ]
    assert config.node_id == "box"


def test_check_config_prints_the_warning_and_succeeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model: Path, llama_server: Path
) -> None:
    config = tmp_path / "agent.yaml"
    config.write_text(
        f"residency_linger_s: 0.05\nbackend: cpu\nllama_server_bin: {llama_server}\n"
        f"models: [{{model_id: a, path: {tiny_model}}}]\n"
    )

    assert main(["check-config", "--config", str(config)]) == 0
    assert capsys.readouterr().err == f"warning: {config}:1: residency_linger_s: no longer has any effect; remove it\n"


def test_a_configuration_without_retired_keys_has_no_warnings() -> None:
    assert parse_config(MODELS, FILE).source.warnings == []
    assert without_retired({"node_id": "box"}) == ({"node_id": "box"}, [])


def test_a_misspelt_retired_key_is_still_an_error() -> None:
    with pytest.raises(ConfigError, match="is not a known key"):
        parse_config(f"residency_lingers_s: 1\n{MODELS}", FILE)
