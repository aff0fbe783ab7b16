"""The keys of the configuration: their kinds, bounds, defaults and meanings. The JSON Schema is made from these.

What is wrong between several keys is `config_checks`' business, reading a file is `config`'s.
"""

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator

from nodeagent.config.checks import MAX_SLOTS
from nodeagent.config.problems import DEVICE_ID, MODEL_NAME, NODE_ID
from nodeagent.config.values import (
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
from nodeagent.config.yaml_source import KeyPath, Source
from nodeagent.errors import Problem

PROGRAM = "rolemesh-node-agent"

_HOUR_S = 3600.0
_DAY_S = 24 * _HOUR_S
_GIB = 2**30
# llama-server reads its numbers as 32-bit integers.
_INT_MAX = 2**31 - 1


def _default_node_id() -> str:
    """The host's name, cut to what an id may be."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")
    return name[:128] or "node"


def _default_state_dir(node_id: str) -> Path:
    """systemd's folder for the unit, else one in the user's state folder."""
    # With several StateDirectory= systemd joins them by colons; the first is the unit's main one.
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    return Path(given) if given else platformdirs.user_state_path() / PROGRAM / node_id


class Keys(BaseModel):
    """Strict, closed and frozen."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class DeviceConfig(Keys):
    """One entry of `devices`."""

    device_id: str = Field(pattern=DEVICE_ID, description="Which device: cpu:0, cpu:1, ... or gpu:0, gpu:1, ...")
    threads: int | None = Field(
        default=None, ge=1, le=4096, description="Threads of each server here, unless its model says otherwise."
    )
    cpus: Cpus | None = Field(default=None, description="The CPUs that its servers are pinned to, by number.")


class RestartConfig(Keys):
    """`restart`, of the node or of one model: when a server that ended is started again."""

    max_restarts: int = Field(
        default=3, ge=0, le=100_000, description="More ends than this within period_s, and the model has failed."
    )
    period_s: float = Field(default=60.0, gt=0, le=_DAY_S, description="The time in which ends are counted.")
    backoff_initial_s: float = Field(
        default=1.0, gt=0, le=_HOUR_S, description="The wait before the second restart; it doubles with each."
    )
    backoff_max_s: float = Field(default=60.0, gt=0, le=_DAY_S, description="The longest such wait.")
    reset_after_s: float = Field(
        default=300.0, ge=0, le=_DAY_S, description="A server that was ready for this long starts afresh."
    )
    cooldown_s: float = Field(
        default=60.0, ge=0, le=_DAY_S, description="When a model that has failed may be tried once more."
    )

    @field_validator("backoff_max_s")
    @classmethod
    def _max_after_initial(cls, value: float, info: ValidationInfo) -> float:
        initial_s = info.data.get("backoff_initial_s", 0.0)
        if value < initial_s:
            raise ValueError(f"must be at least backoff_initial_s ({initial_s:g}), found {value:g}")
        return value


class ModelConfig(Keys):
    """One entry of `models`. What is None is left to llama-server."""

    model_id: str = Field(pattern=MODEL_NAME, description="The name by which requests ask for the model.")
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
        default=None, pattern=MODEL_NAME, description="Another name by which requests can ask for the model (-a)."
    )
    preload: bool = Field(default=False, description="Load the model when the agent starts, not on its first request.")
    parallel: int = Field(
        default=1, ge=1, le=MAX_SLOTS, description="Requests that one server of the model serves at a time (-np)."
    )
    restart: RestartConfig | None = Field(
        default=None, description="For this model alone; what is left out is as in the node's restart."
    )
    stall_timeout_s: float | None = Field(
        default=None, ge=1, le=_DAY_S, description="As the node's stall_timeout_s, for this model alone."
    )
    idle_unload_s: float | None = Field(
        default=None,
        ge=0,
        le=30 * _DAY_S,
        description="Unload the model after so long without a request; never where left out.",
    )
    keep_kv: bool = Field(
        default=False,
        description="Keep the server's cache in a file over a switch of models, so that conversations go on at once.",
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


class NodeConfig(Keys):
    """The whole configuration. Durations are in seconds, sizes in bytes."""

    listen_host: Host = Field(default="127.0.0.1", description="The address to listen on.")
    listen_port: int = Field(default=8081, ge=0, le=65535, description="The port to listen on; 0 picks a free one.")
    node_id: str = Field(
        default_factory=_default_node_id,
        pattern=NODE_ID,
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
    restart: RestartConfig = Field(
        default_factory=RestartConfig, description="When a server that ended is started again."
    )
    stall_timeout_s: float = Field(
        default=120.0, ge=1, le=_DAY_S, description="A server at work that shows no progress for so long is replaced."
    )
    memory_settle_timeout_s: float = Field(
        default=5.0,
        ge=0,
        le=_HOUR_S,
        description="How long to wait for a GPU's memory to come back after a server's end, before the next load.",
    )
    max_pending_requests_per_device: int = Field(
        default=2, ge=1, le=100_000, description="Requests in flight and waiting per device; the next is refused."
    )
    queue_timeout_s: float = Field(
        default=300.0, gt=0, le=_DAY_S, description="How long a request waits for its turn before it is refused."
    )
    scheduling: Literal["swap_aware", "fifo"] = Field(
        default="swap_aware",
        description="How a device's requests are ordered: so that few switches of models are needed, or as they come.",
    )
    swap_fairness_s: float = Field(
        default=30.0, gt=0, le=_DAY_S, description="For no longer than this is a request passed by later ones."
    )
    min_residency_s: float = Field(
        default=2.0, ge=0, le=_DAY_S, description="A model that was loaded may serve its requests first for so long."
    )
    residency_linger_s: float = Field(
        default=0.05,
        ge=0,
        le=_HOUR_S,
        description="How long a device idles before a switch, for the clients that it has just answered.",
    )
    abandoned_load_grace_s: float = Field(
        default=30.0, ge=0, le=_DAY_S, description="How long a load goes on when those who waited for it have left."
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

    def came_from(self, source: Source) -> None:
        """Remember the file that this was read from, for `problem`."""
        self._source = source

    def model(self, name: str) -> ModelConfig | None:
        """The model with that id or alias."""
        return next((model for model in self.models if name in (model.model_id, model.alias)), None)

    def problem(self, path: KeyPath, message: str) -> Problem:
        """A problem with that key, with its file and line where this configuration came from one."""
        return self.source.problem(path, message)
