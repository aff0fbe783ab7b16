"""Each example is a valid configuration, and the committed schema is the one that the code makes."""

import json
import re
from pathlib import Path

import pytest

from nodeagent.config import DeviceConfig, ModelConfig, NodeConfig, json_schema, load_config, parse_config

CONFIGS = Path(__file__).parents[3] / "configs"
EXAMPLE = CONFIGS / "node_agent.example.yaml"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_an_example_is_valid(path: Path) -> None:
    assert load_config(path).models


def test_the_example_shows_every_key_and_stays_valid_with_all_of_them_set() -> None:
    text = re.sub(r"^( *)#(?=\w+:)", r"\1", EXAMPLE.read_text(encoding="utf-8"), flags=re.MULTILINE)

    config = parse_config(text, EXAMPLE)

    assert config.model_fields_set == set(NodeConfig.model_fields)
    assert config.devices[0].model_fields_set == set(DeviceConfig.model_fields)
    assert config.models[0].model_fields_set == set(ModelConfig.model_fields)


def test_what_the_example_calls_a_default_is_one() -> None:
    config = load_config(EXAMPLE)
    bare = parse_config("node_id: example-node\nmodels: [{model_id: a, path: a}]", EXAMPLE)

    for key in set(NodeConfig.model_fields) - {"backend", "devices", "models"}:
        assert getattr(config, key) == getattr(bare, key), key


def test_the_committed_schema_is_the_one_of_the_code() -> None:
    committed = json.loads((CONFIGS / "node_agent.schema.json").read_text(encoding="utf-8"))

    assert committed == json_schema(), "write it anew: rolemesh-node-agent schema > configs/node_agent.schema.json"


def test_the_schema_says_of_every_key_what_it_is() -> None:
    schema = json_schema()

    for part in (schema, schema["$defs"]["ModelConfig"], schema["$defs"]["DeviceConfig"]):
        assert part["additionalProperties"] is False
        for key, said in part["properties"].items():
            assert said.get("description"), key
