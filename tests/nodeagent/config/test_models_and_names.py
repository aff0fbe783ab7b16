"""The names of models, what may serve in their place, and their own parameters and limits."""

from pathlib import Path

import pytest

from nodeagent.config import NodeConfig, parse_config
from nodeagent.errors import ConfigError

FILE = Path("/etc/node.yaml")


def parse(first: str = "", second: str = "", node: str = "") -> NodeConfig:
    models = f"models: [{{model_id: a, path: a{first}}}, {{model_id: b, path: b{second}}}]\n"
    return parse_config(models + node, FILE)


def complaint(first: str = "", second: str = "", node: str = "") -> str:
    with pytest.raises(ConfigError) as caught:
        parse(first, second, node)
    [problem] = caught.value.problems
    return f"{problem.where}: {problem.message}"


def test_a_model_has_its_alias_and_its_aliases() -> None:
    config = parse(", alias: x, aliases: [y, z]")
    assert config.models[0].names == ("x", "y", "z")
    assert config.model("z") is config.models[0]
    assert config.models[1].names == ()


@pytest.mark.parametrize(
    ("first", "second", "node", "said"),
    [
        (
            ", aliases: [b]",
            "",
            "",
            "models[1].model_id: 'b' is already the alias of models[0]; each name must belong to",
        ),
        (", alias: x, aliases: [x]", "", "", "models[0].aliases[0]: 'x' is already the alias of models[0]"),
        (", aliases: x", "", "", "models[0].aliases: must be a list, found 'x'"),
        (", aliases: ['a,b']", "", "", "models[0].aliases[0]: must be a name of letters"),
        (", fallback: [c]", "", "", "models[0].fallback[0]: must be the model_id of another model (a, b), found 'c'"),
        (", fallback: [a]", "", "", "models[0].fallback[0]: must be another model, found 'a' itself"),
        (", fallback: [b, b]", "", "", "models[0].fallback[1]: 'b' is in the list already"),
        (
            ", task: chat, fallback: [b]",
            ", task: embedding",
            "",
            "models[0].fallback[0]: must be a model for the same task: 'b' is for embedding, this one for chat",
        ),
        (", defaults: {model: x}", "", "", "models[0].defaults: must be parameters of generation, such as temperature"),
        (", overrides: {stream: true}", "", "", "models[0].overrides: must be parameters of generation"),
        (", overrides: {messages: []}", "", "", "models[0].overrides: must be parameters of generation"),
        (", defaults: 5", "", "", "models[0].defaults: must be a mapping"),
        (
            ", max_request_bytes: 11",
            "",
            "max_request_bytes: 10",
            "models[0].max_request_bytes: must be at most that of",
        ),
        (", max_request_bytes: 99999999", "", "", "models[0].max_request_bytes: must be at most that of the node"),
        (", queue_timeout_s: 0", "", "", "models[0].queue_timeout_s: must be more than 0, found 0"),
    ],
)
def test_what_is_wrong_is_said(first: str, second: str, node: str, said: str) -> None:
    assert complaint(first, second, node).startswith(said)


def test_models_may_fall_back_to_each_other_and_have_any_parameters() -> None:
    config = parse(", fallback: [b], defaults: {temperature: 0.2, stop: [x], t: null}", ", fallback: [a]")
    assert config.models[0].defaults == {"temperature": 0.2, "stop": ["x"], "t": None}
