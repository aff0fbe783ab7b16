"""No name in a configuration can forge a line of the log, a header or what a terminal shows."""

import json
from pathlib import Path
from typing import Any

import pytest

from nodeagent.cli.main import main
from nodeagent.config import key_file, parse_config
from nodeagent.errors import ConfigError
from nodeagent.logs import printable

FORGED = ["a\n", "\na", "a\r\nX-Evil: 1", "a\x1b[2J", "a\x9b31m", "a\u202eb", "a\u2028b", "a\0", "\x07"]
ODD = ["", " ", "a b", 'a"b', "a'b", "../a", "/a", "-a", "é", "a" * 300, "a\\b", "a,b", "a{b}", "<b>", "a%0ab"]


def config_with(key: str, name: str) -> str:
    model: dict[str, Any] = {"model_id": "tiny", "path": "tiny.gguf"}
    keys: dict[str, dict[str, Any]] = {
        "model_id": {"models": [model | {"model_id": name}]},
        "alias": {"models": [model | {"alias": name}]},
        "aliases": {"models": [model | {"aliases": [name]}]},
        "roles": {"models": [model | {"roles": [name]}]},
        "name": {"api_keys": [{"name": name, "env": "KEY"}]},
        "node_id": {"node_id": name},
        "device_id": {"devices": [{"device_id": name}]},
    }
    return json.dumps({"models": [model]} | keys[key])


@pytest.mark.parametrize("name", FORGED)
@pytest.mark.parametrize("key", ["model_id", "alias", "aliases", "roles", "name", "node_id", "device_id"])
def test_no_name_has_characters_that_forge(key: str, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(config_with(key, name), Path("/etc/node.yaml"))
    assert any(key in problem.where for problem in caught.value.problems)


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("key", ["model_id", "aliases", "name", "node_id", "device_id"])
def test_what_goes_into_urls_and_files_is_of_letters_and_digits(key: str, name: str) -> None:
    with pytest.raises(ConfigError):
        parse_config(config_with(key, name), Path("/etc/node.yaml"))


@pytest.mark.parametrize("name", [*FORGED, *ODD])
def test_no_key_is_made_for_such_a_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "node.yaml"
    models = [{"model_id": "tiny", "path": "tiny.gguf"}]
    file.write_text(json.dumps({"state_dir": str(tmp_path / "state"), "models": models}))
    try:
        code = main(["keys", "add", "--config", str(file), "--", name])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code != 0
    assert not key_file(tmp_path / "state").exists()
    said = capsys.readouterr().err.replace("\n", "")
    assert printable(said) == said
