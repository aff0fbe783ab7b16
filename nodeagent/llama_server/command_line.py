"""How a model's server is started on a device: llama-server's whole command line and environment. Pure.

The order of the command line: what the agent needs for itself, the keys of the configuration, what keeps the server to
its device, and `server_args`.
"""

import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import msgspec

from nodeagent.config import Dialect, ModelConfig, NodeConfig
from nodeagent.config.server_flags import flags_argv, sets_flag
from nodeagent.devices.values import DeviceRef
from nodeagent.gguf.header import GgufHeader
from nodeagent.llama_server.server_id import ServerId
from nodeagent.llama_server.spans import runs_on, spans_of
from nodeagent.llama_server.tasks import task_args
from nodeagent.state_dir import kv_folder
from supervisor.probe import Probe
from supervisor.restart import RestartPolicy
from supervisor.spec import ChildSpec, StopPolicy

API_KEY_VARIABLE = "LLAMA_API_KEY"

# A server that streams exits on SIGTERM only at its next ping (every 30 s by default). Set by a variable, not by the
# flag: builds that don't know it ignore a variable, but exit on an unknown flag.
_SSE_PING = {"LLAMA_ARG_SSE_PING_INTERVAL": "2"}

# HTTP threads besides one for each slot: for the probes, and for requests whose client left but whose slot is not free
# yet. If streams hold all threads, `/health` stalls for seconds.
_SPARE_HTTP_THREADS = 4

# The server chooses the slot of a request. By default (0.1) conversations that share a system prompt compete for one
# slot. This close to 1 each keeps its own, and a conversation without a slot gets the one that was idle for longest;
# the server's cache in memory restores what was evicted. Measured with 488 tokens of shared prompt, as the share of
# prompt tokens that were cached: two conversations taking turns on two slots 63% instead of 58%, three on two slots 71%
# instead of 67%. Naming the slot in the request (`id_slot`) gave 63%, and was worse with more conversations than slots.
_SLOT_SIMILARITY = "0.95"
_SLOT_CHOICE = ("slot-prompt-similarity", "cache-ram")

# What a server must not inherit from the agent's environment: llama-server's settings (each of its flags can be set
# there), and what systemd set for the agent.
_NOT_INHERITED_PREFIXES = ("LLAMA_", "WATCHDOG_", "LISTEN_")
_NOT_INHERITED = frozenset({"NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY"})


# What llama-server leaves free by itself when it fits a model into a device's memory (--fit-target).
_FIT_MARGIN_MIB = 1024
_MIB = 2**20

DialectOf = Callable[[str], Dialect]
"""The dialect of a binary; it is asked only where it matters."""


def _newest(_binary: str) -> Dialect:
    return Dialect()


class Pinning(Protocol):
    """The part of a backend that keeps a server to its device, or to those that it spans."""

    def child_env(self, device: DeviceRef) -> Mapping[str, str]: ...

    def child_args(self, device: DeviceRef) -> Sequence[str]: ...


class Command(msgspec.Struct, frozen=True):
    """The whole argv, and the variables that are added to the inherited environment: the configured ones, and those of
    the agent, which are no secrets."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def command(
    model: ModelConfig,
    device: DeviceRef,
    backend: Pinning,
    binary: Path,
    kv: Path,
    dialect_of: DialectOf = _newest,
    header: GgufHeader | None = None,
) -> Command:
    """The server of that model on that device; `kv` is the folder of saved caches (`keep_kv`). `header` is that of the
    model's file, None if it can't be read."""
    save_path = ["--slot-save-path", str(kv)] if model.keep_kv else []
    argv = [_program(model, device, binary), *_own_args(model), *save_path]
    argv += [*_model_args(model), *task_args(model, header), *_thread_args(model, device)]
    argv += [*_companion_args(model, argv[0], dialect_of), *_reserve_args(model, device, argv[0], dialect_of)]
    argv += [*backend.child_args(device), *flags_argv(model.server_args)]
    return Command(tuple(argv), MappingProxyType({**_SSE_PING, **device.env, **model.env, **backend.child_env(device)}))


def _program(model: ModelConfig, device: DeviceRef, binary: Path) -> str:
    """The llama-server of the model, else that of the device, else the node's."""
    own = model.llama_server_bin or device.llama_server_bin
    return str(binary) if own is None else shutil.which(own) or own


def model_arguments(model: ModelConfig, header: GgufHeader | None = None) -> tuple[str, ...]:
    """The arguments that the configuration gives the model's server on any device, for people; without secrets."""
    threads = _pairs({"-t": model.threads, "-tb": model.threads_batch})
    return (
        "-np",
        str(model.parallel),
        *_model_args(model),
        *task_args(model, header),
        *_companion_args(model, "", _newest),
        *threads,
        *flags_argv(model.server_args),
    )


def child_spec(
    model: ModelConfig,
    device: DeviceRef,
    backend: Pinning,
    binary: Path,
    *,
    config: NodeConfig,
    probe: Probe,
    api_key: str,
    environ: Mapping[str, str],
    dialect_of: DialectOf = _newest,
    header: GgufHeader | None = None,
) -> ChildSpec:
    """The same as a child of the supervisor, in the group of its device.

    The key is in the environment, since every user of the host can see a command line. `environ` is the environment to
    inherit from.
    """
    run = command(model, device, backend, binary, kv_folder(config.state_dir), dialect_of, header)
    inherited = inherited_env(environ)
    for entry in config.api_keys:
        inherited.pop(entry.env or "", None)
    return ChildSpec(
        child_id=str(ServerId(device.device_id, model.model_id)),
        group=device.device_id,
        argv=run.argv,
        env={**inherited, **run.env, API_KEY_VARIABLE: api_key},
        probe=probe,
        cpus=device.cpus,
        start_timeout_s=config.llama_server_startup_limit_s,
        probe_interval_s=config.llama_server_probe_interval_s,
        restart=_restart_policy(model, config),
        stop=StopPolicy(grace_s=config.llama_server_stop_grace_s),
    )


def _restart_policy(model: ModelConfig, config: NodeConfig) -> RestartPolicy:
    """The policy of the node, with the keys that the model sets itself."""
    own = model.restart.model_dump(exclude_unset=True) if model.restart is not None else {}
    return RestartPolicy(mode="permanent", **{**config.restart.model_dump(), **own})


def inherited_env(environ: Mapping[str, str]) -> dict[str, str]:
    """The part of the agent's environment that its servers inherit."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _NOT_INHERITED and not name.startswith(_NOT_INHERITED_PREFIXES)
    }


def describe(
    config: NodeConfig,
    devices: Sequence[DeviceRef],
    backend: Pinning,
    binary: Path,
    dialect_of: DialectOf = _newest,
    headers: Mapping[str, GgufHeader] = MappingProxyType({}),
) -> str:
    """What would be run for each model and device, as lines for a shell, with the secret masked.

    `headers` are those of the models' files, as far as they can be read.
    """
    kv = kv_folder(config.state_dir)
    return "\n\n".join(
        _described(model, device, command(model, device, backend, binary, kv, dialect_of, headers.get(model.model_id)))
        for model in config.models
        for device in (*devices, *spans_of(config, devices))
        if runs_on(model, device)
    )


def _described(model: ModelConfig, device: DeviceRef, run: Command) -> str:
    pinned = f", on CPUs {','.join(map(str, sorted(device.cpus)))}" if device.cpus else ""
    variables = [f"{name}={shlex.quote(value)}" for name, value in run.env.items()]
    shell_line = " ".join([*variables, f"{API_KEY_VARIABLE}=***", shlex.join(run.argv)])
    return f"# {model.model_id} on {device.device_id} ({device.name}){pinned}\n{shell_line}"


def _own_args(model: ModelConfig) -> list[str]:
    """What the agent needs: a private address, the name that the probe checks, the slots, and metrics."""
    # The server puts this name into every answer, whatever name was asked for.
    argv = ["-m", str(model.path), "-a", model.model_id, "--host", "127.0.0.1", "--port", "0"]
    # Always: the default is four slots.
    argv += ["-np", str(model.parallel)]
    if model.parallel > 1 and not any(sets_flag(model.server_args, flag) for flag in _SLOT_CHOICE):
        argv += ["-sps", _SLOT_SIMILARITY]
    if not sets_flag(model.server_args, "threads-http"):
        argv += ["--threads-http", str(model.parallel + _SPARE_HTTP_THREADS)]
    # The older name of --no-ui, which every build knows.
    return [*argv, "--no-webui", "--slots", "--metrics"]


def _model_args(model: ModelConfig) -> list[str]:
    shares = model.tensor_split and ",".join(f"{share:g}" for share in model.tensor_split)
    return _pairs(
        {
            "-c": model.ctx_size,
            "-b": model.batch_size,
            "-ub": model.ubatch_size,
            "-ngl": model.gpu_layers,
            "-sm": model.split_mode,
            "-mg": model.main_gpu,
            "-ts": shares,
            # Always with a value: a bare -fa takes the next argument as its value.
            "-fa": model.flash_attn,
        }
    )


def _companion_args(model: ModelConfig, binary: str, dialect_of: DialectOf) -> list[str]:
    """The files beside the model's own: projector, draft model, LoRA adapters."""
    # The short form of --spec-draft-model, which every build knows.
    argv = _pairs({"--mmproj": model.mmproj, "-md": model.draft_model})
    if model.draft_model and not sets_flag(model.server_args, "spec-type") and dialect_of(binary).has_spec_type:
        argv += ["--spec-type", "draft-simple"]
    for lora in model.loras:
        if lora.scale == 1:
            argv += ["--lora", str(lora.path)]
        elif dialect_of(binary).scales_by_colon:
            argv += ["--lora-scaled", f"{lora.path}:{lora.scale:g}"]
        else:
            argv += ["--lora-scaled", str(lora.path), f"{lora.scale:g}"]
    return argv


def _reserve_args(model: ModelConfig, device: DeviceRef, binary: str, dialect_of: DialectOf) -> list[str]:
    """Where llama-server fits a model into a GPU's memory, it leaves free what is reserved for others."""
    # One number holds for each of several devices.
    reserve_mib = -(-max(part.memory_reserve_bytes for part in device.parts) // _MIB)
    if device.backend == "cpu" or reserve_mib <= _FIT_MARGIN_MIB or sets_flag(model.server_args, "fit-target"):
        return []
    return ["-fitt", str(reserve_mib)] if dialect_of(binary).has_fit_target else []


def _thread_args(model: ModelConfig, device: DeviceRef) -> list[str]:
    """The numbers of the model, else of the device, else one thread for each CPU that the server is pinned to.

    By default llama-server starts a thread for each core of the host, even if it may run on a few of them only. Where
    the agent itself is limited, the device has a number already (`devices/limits.py`).
    """
    threads = model.threads or device.threads or (len(device.cpus) if device.cpus else None)
    if sets_flag(model.server_args, "threads"):
        threads = None
    batch = None if sets_flag(model.server_args, "threads-batch") else model.threads_batch or threads
    return _pairs({"-t": threads, "-tb": batch})


def _pairs(values: Mapping[str, object]) -> list[str]:
    """Flags with their values; a flag whose value is None is omitted."""
    return [part for flag, value in values.items() if value is not None for part in (flag, str(value))]
