"""How a model's server is started on a device: all of llama-server's command line and environment.

Pure: values in, values out. The command line is made of, in this order: what the agent needs for itself, what the
configuration's keys say, what pins the device, and `server_args`.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from nodeagent.config import ModelConfig, NodeConfig
from nodeagent.config.server_flags import flags_argv, sets_flag
from nodeagent.devices.values import DeviceRef
from nodeagent.llama_server.server_id import ServerId
from nodeagent.state_dir import kv_folder
from supervisor.probe import Probe
from supervisor.restart import RestartPolicy
from supervisor.spec import ChildSpec, StopPolicy

API_KEY_VARIABLE = "LLAMA_API_KEY"

# A server that streams obeys SIGTERM only at its next ping (30 s apart by default). By the environment, not by its
# flag: builds that don't know it yet pass over a variable, but end at a flag.
_SSE_PING = {"LLAMA_ARG_SSE_PING_INTERVAL": "2"}

# HTTP threads beyond one for each slot: for the probes, and for requests whose client left but whose slot is not
# free yet. With all threads held by streams, `/health` stalls for seconds.
_SPARE_HTTP_THREADS = 4

# Which slot a request goes to is the server's choice. By default (0.1) conversations that share a system prompt fight
# over one slot. This close to 1 each keeps its own, and one that has none takes the slot that was idle for longest,
# whose content the server's cache in memory brings back. Measured with 488 tokens of shared prompt, cached of all
# prompt tokens: two conversations in turns on two slots 63% instead of 58%, three on two slots 71% instead of 67%; to
# name the slot in the request (`id_slot`) brought 63%, and with more conversations than slots less than nothing.
_SLOT_SIMILARITY = "0.95"
_SLOT_CHOICE = ("slot-prompt-similarity", "cache-ram")

# Of the agent's own environment a server must not inherit: llama-server's settings (any of its flags can be set
# there), and what systemd told the agent about itself.
_NOT_INHERITED_PREFIXES = ("LLAMA_", "WATCHDOG_", "LISTEN_")
_NOT_INHERITED = frozenset({"NOTIFY_SOCKET"})


class Pinning(Protocol):
    """The part of a backend that says how a server is kept to one device."""

    def child_env(self, device: DeviceRef) -> Mapping[str, str]: ...

    def child_args(self, device: DeviceRef) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True)
class Command:
    """What is run: the whole argv, and the variables added to the inherited environment (none of them a secret)."""

    argv: tuple[str, ...]
    env: Mapping[str, str]


def command(model: ModelConfig, device: DeviceRef, backend: Pinning, binary: Path, kv: Path) -> Command:
    """The server of that model on that device; `kv` is the folder for the model's `keep_kv`."""
    kept = ["--slot-save-path", str(kv)] if model.keep_kv else []
    argv = [str(binary), *_own_args(model), *kept, *_model_args(model), *_thread_args(model, device)]
    argv += [*backend.child_args(device), *flags_argv(model.server_args)]
    return Command(tuple(argv), MappingProxyType({**_SSE_PING, **backend.child_env(device)}))


def model_arguments(model: ModelConfig) -> tuple[str, ...]:
    """What the configuration says of the model's server on any device, for people to read; no secret is in it."""
    threads = _pairs({"-t": model.threads, "-tb": model.threads_batch})
    return ("-np", str(model.parallel), *_model_args(model), *threads, *flags_argv(model.server_args))


def child_spec(
    model: ModelConfig,
    device: DeviceRef,
    backend: Pinning,
    binary: Path,
    *,
    config: NodeConfig,
    probe: Probe,
    api_key: str,
    environ: Mapping[str, str] | None = None,
) -> ChildSpec:
    """The same as a child of the supervisor, in the group of its device.

    The key goes by the environment, since a command line is seen by every user of the host. `environ` is what is
    inherited, the agent's own where left out.
    """
    run = command(model, device, backend, binary, kv_folder(config.state_dir))
    inherited = inherited_env(os.environ if environ is None else environ)
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
    """The node's, with what the model says otherwise."""
    own = model.restart.model_dump(exclude_unset=True) if model.restart is not None else {}
    return RestartPolicy(mode="permanent", **{**config.restart.model_dump(), **own})


def inherited_env(environ: Mapping[str, str]) -> dict[str, str]:
    """What of the agent's environment its servers may see."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _NOT_INHERITED and not name.startswith(_NOT_INHERITED_PREFIXES)
    }


def describe(config: NodeConfig, devices: Sequence[DeviceRef], backend: Pinning, binary: Path) -> str:
    """For each model and device what would be run, as lines for a shell, with the secret masked."""
    return "\n\n".join(
        _described(model, device, command(model, device, backend, binary, kv_folder(config.state_dir)))
        for model in config.models
        for device in devices
    )


def _described(model: ModelConfig, device: DeviceRef, run: Command) -> str:
    pinned = f", on CPUs {','.join(map(str, sorted(device.cpus)))}" if device.cpus else ""
    variables = [shlex.quote(f"{name}={value}") for name, value in run.env.items()]
    shell_line = " ".join([*variables, f"{API_KEY_VARIABLE}=***", shlex.join(run.argv)])
    return f"# {model.model_id} on {device.device_id} ({device.name}){pinned}\n{shell_line}"


def _own_args(model: ModelConfig) -> list[str]:
    """What the agent needs: a private address, the name that the probe asks for, slots, and a look inside."""
    argv = ["-m", str(model.path), "-a", model.server_name, "--host", "127.0.0.1", "--port", "0"]
    # Always: without it this server takes four slots.
    argv += ["-np", str(model.parallel)]
    if model.parallel > 1 and not any(sets_flag(model.server_args, flag) for flag in _SLOT_CHOICE):
        argv += ["-sps", _SLOT_SIMILARITY]
    if not sets_flag(model.server_args, "threads-http"):
        argv += ["--threads-http", str(model.parallel + _SPARE_HTTP_THREADS)]
    # The older name of --no-ui: every build knows it.
    return [*argv, "--no-webui", "--slots", "--metrics"]


def _model_args(model: ModelConfig) -> list[str]:
    shares = model.tensor_split and ",".join(f"{share:g}" for share in model.tensor_split)
    return _pairs(
        {
            "-c": model.ctx_size,
            "-b": model.batch_size,
            "-ub": model.ubatch_size,
            "-ngl": model.gpu_layers,
            "-mg": model.main_gpu,
            "-ts": shares,
            # With its value always: a bare -fa takes the next argument for it.
            "-fa": model.flash_attn,
        }
    )


def _thread_args(model: ModelConfig, device: DeviceRef) -> list[str]:
    """The model's own numbers, else the device's, else one thread for each CPU that it is pinned to.

    llama-server by itself starts a thread for each core of the host, however few it may run on.
    """
    threads = model.threads or device.threads or (len(device.cpus) if device.cpus else None)
    if sets_flag(model.server_args, "threads"):
        threads = None
    batch = None if sets_flag(model.server_args, "threads-batch") else model.threads_batch or threads
    return _pairs({"-t": threads, "-tb": batch})


def _pairs(values: Mapping[str, object]) -> list[str]:
    """Flags with their values, without those that have none."""
    return [part for flag, value in values.items() if value is not None for part in (flag, str(value))]
