"""Reading the configuration file, and reporting everything that is wrong with it.

`load_config` reports every problem at once, each as one line with file, line and key. Nothing is coerced: "8192" is
not a number. Relative paths start in the configuration file's folder, and `~` is the user's home. What the
configuration names on this host (files, programs, CPUs) is checked by `host_checks`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nodeagent.config.api_keys import ApiKeyConfig
from nodeagent.config.base import Keys
from nodeagent.config.checks import Document, check_document, is_slot_count, server_args_parallel
from nodeagent.config.keys import DeviceConfig, NodeConfig, no_home
from nodeagent.config.model_keys import ModelConfig
from nodeagent.config.problems import explain, shown
from nodeagent.config.retired import without_retired
from nodeagent.config.yaml_source import KeyPath, Source, read_yaml
from nodeagent.errors import ConfigError, Problem

_BODIES_KEPT = "the bodies of requests and answers are kept in memory, and operators can read them"


def load_config(path: Path) -> NodeConfig:
    """Read the configuration file. Raises ConfigError with everything that is wrong with it.

    Does not look for model files, the server's binary and the like: see `host_checks.host_problems`.
    """
    return _accepted(read_source(path))


def parse_config(text: str, file: Path) -> NodeConfig:
    """As `load_config`, for text; `file` is named in problems, and relative paths start in its folder."""
    return _accepted(read_yaml(text, file))


def read_source(path: Path) -> Source:
    """Read and parse the file. Raises ConfigError if it can't be read; what is wrong in it is in `Source.problems`."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(f"is not UTF-8 text (byte {error.start})", file=path)]) from error
    except OSError as error:
        raise ConfigError([Problem(f"can't be read: {error.strerror}", file=path)]) from error
    return read_yaml(text, path)


def _accepted(source: Source) -> NodeConfig:
    config, problems = validated(source)
    if config is None:
        raise ConfigError(problems)
    return config


def validated(source: Source) -> tuple[NodeConfig | None, list[Problem]]:
    """The configuration, or None and everything that is wrong with it."""
    document = source.value
    if not isinstance(document, dict):
        message = f"must be a mapping of keys to values, found {'nothing' if document is None else shown(document)}"
        return None, source.problems or [Problem(message, file=source.file)]
    document, retired = without_retired(document)
    source.warnings = [source.problem(path, message) for path, message in retired]
    problems = [*source.problems, *(source.problem(path, message) for path, message in check_document(document))]
    config = None
    try:
        config = NodeConfig.model_validate(_with_parallel_lifted(document), context=source.folder)
    except ValidationError as error:
        problems += _in_words(error, source)
    if problems:
        return None, in_order(problems)
    if config is not None:
        config.came_from(source)
        if config.activity.bodies:
            source.warnings.append(source.problem(("activity", "bodies"), _BODIES_KEPT))
        if (homeless := no_home(config.state_dir)) is not None:
            return None, [source.problem(("state_dir",), homeless)]
    return config, []


def _in_words(error: ValidationError, source: Source) -> Iterator[Problem]:
    for record in error.errors(include_url=False):
        # A default derived from a wrong key, a list that is "too short" for its wrong items: those keys are reported.
        follows = record["type"] == "default_factory_not_called" or (record["type"] == "too_short" and record["input"])
        if not follows:
            yield source.problem(record["loc"], explain(record, _keys_beside(record["loc"])))


def _keys_beside(path: KeyPath) -> Iterable[str]:
    """The known keys of the mapping that holds this key."""
    entries: dict[str, type[Keys]] = {"models": ModelConfig, "devices": DeviceConfig, "api_keys": ApiKeyConfig}
    return entries.get(str(path[0]) if len(path) > 1 else "", NodeConfig).model_fields


def _with_parallel_lifted(document: Document) -> Document:
    """`parallel` given as a flag is moved to the key with the same meaning; its problems have been reported."""
    models = document.get("models")
    if not isinstance(models, list):
        return document
    return {**document, "models": [_model_with_parallel_lifted(model) for model in models]}


def _model_with_parallel_lifted(model: object) -> object:
    if not isinstance(model, dict) or (flag := server_args_parallel(model)) is None:
        return model
    name, value = flag
    server_args = {key: other for key, other in model["server_args"].items() if key != name}
    lifted = {"parallel": value} if is_slot_count(value) else {}
    return {**lifted, **model, "server_args": server_args}


def in_order(problems: Iterable[Problem]) -> list[Problem]:
    """Sorted by line; problems without a line come first."""
    return sorted(problems, key=lambda problem: problem.line or 0)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the configuration file, for editors."""
    schema = NodeConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "RoleMesh Node Agent"}


def with_keys(config: NodeConfig, keys: dict[str, Any]) -> NodeConfig:
    """The configuration with these keys replaced by already validated values."""
    changed = config.model_copy(update=keys)
    changed._source = config.source
    return changed
