"""The keys of the configuration: their types, bounds, defaults and meanings.

The JSON Schema and the reference in configs/README.md are generated from them. `checks` finds contradictions between
keys, `loading` reads the file.
"""

import os
import re
import socket
from pathlib import Path
from typing import Annotated, Literal

import platformdirs
from pydantic import Field, PrivateAttr, ValidationInfo, field_validator

from nodeagent.config.api_keys import ApiKeyConfig
from nodeagent.config.base import Keys
from nodeagent.config.model_keys import DAY_S, GIB, HOUR_S, ModelConfig, RestartConfig
from nodeagent.config.problems import DEVICE_ID, NODE_ID
from nodeagent.config.values import (
    AbsolutePath,
    AsTuple,
    BaseUrl,
    Command,
    Cpus,
    Host,
    HostName,
    Label,
    Origin,
    Variables,
)
from nodeagent.config.yaml_source import KeyPath, Source
from nodeagent.errors import Problem

PROGRAM = "rolemesh-node-agent"

_MODELS_MAX = 64
_MEMORY_MAX = 2**50


def _default_node_id() -> str:
    """The host name, reduced to the characters and length of an id."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname()).lstrip("._-")
    return name[:128] or "node"


def _default_state_dir(node_id: str) -> Path:
    """systemd's folder for the unit, else one in the user's state folder."""
    # With several StateDirectory= systemd joins them by colons; the first is the unit's main one.
    given = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if given:
        return Path(given)
    try:
        root = platformdirs.user_state_path()
    except RuntimeError:  # what it raises depends on its version; see `no_home`
        root = Path("~")
    return root / PROGRAM / node_id


def no_home(state_dir: Path) -> str | None:
    """What is wrong with a default `state_dir` where the user has no home folder: its `~` could not be expanded."""
    if state_dir.is_absolute():
        return None
    return "must be set: this user has no home folder (HOME is not set, and there is no passwd entry)"


class DeviceConfig(Keys):
    """One entry of `devices`."""

    device_id: str = Field(
        pattern=DEVICE_ID,
        description="The device: cpu:0, cpu:1, ...; gpu:0, gpu:1, ... of `backend`; or of another backend, by its "
        "name: cuda:0, rocm:0, sycl:0, vulkan:0, metal:0.",
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="CPU threads of each server on this device; a model's own `threads` takes precedence. By default "
        "one for each of the host's cores, or of the device's `cpus`; where the agent itself may use fewer CPUs "
        "(affinity, cgroup quota), those divided among the devices, rounded up.",
    )
    cpus: Cpus | None = Field(default=None, description="Numbers of the CPUs that its servers may run on.")
    max_models: int | None = Field(
        default=None, ge=1, le=_MODELS_MAX, description="Overrides the node's `max_models_per_device` for this device."
    )
    concurrent_models: bool | None = Field(
        default=None, description="Overrides the node's `concurrent_models` for this device."
    )
    llama_server_bin: Command | None = Field(
        default=None, description="The llama-server of this device; the node's by default."
    )
    env: Variables = Field(default={}, description="Environment variables of the servers on this device.")
    memory_reserve_bytes: int | None = Field(
        default=None,
        ge=0,
        le=_MEMORY_MAX,
        description="Overrides the node's `memory_reserve_bytes` for this device.",
    )


class ActivityConfig(Keys):
    """`activity`: what each request took, and if asked for, its content."""

    max_records: int = Field(
        default=1000, ge=1, le=100_000, description="Requests that `/v1/node/activity` can look back on."
    )
    path: AbsolutePath | None = Field(
        default=None,
        description="SQLite file in which the last 100,000 outlast the agent; they are in memory only by default.",
    )
    bodies: bool = Field(
        default=False,
        description="Keep the bodies of these requests and of their answers too, in memory only, for operators to see "
        "(`activity --id`, the page).",
    )
    max_body_bytes: int = Field(
        default=64 * 2**10, ge=1, le=4 * 2**20, description="Bytes that are kept of each body; the rest is cut off."
    )
    max_bodies_bytes: int = Field(
        default=16 * 2**20,
        ge=1,
        le=64 * GIB,
        description="Bytes that are kept of all bodies together; the oldest make room.",
    )


class NodeConfig(Keys):
    """The whole configuration. Durations are in seconds, sizes in bytes."""

    listen_host: Host = Field(default="127.0.0.1", description="Address to listen on.")
    listen_port: int = Field(default=8081, ge=0, le=65535, description="Port to listen on; 0 picks a free one.")
    agent_check_port: int | None = Field(
        default=None,
        ge=0,
        le=65535,
        description="Port on `listen_host` for HAProxy's agent check (`agent-port`), which tells how the node is, how "
        "many of its places are free, and how many there are. 0 picks a free one; none by default.",
    )
    node_id: str = Field(
        default_factory=_default_node_id,
        pattern=NODE_ID,
        description="Permanent name of this node in the mesh; the host name by default.",
    )
    node_name: Label = Field(
        default_factory=lambda data: data["node_id"], description="Display name of the node; `node_id` by default."
    )
    state_dir: AbsolutePath = Field(
        default_factory=lambda data: _default_state_dir(data["node_id"]),
        description="Folder for the agent's state; $STATE_DIRECTORY or the user's state folder by default.",
    )
    dispatcher_base_url: BaseUrl | None = Field(
        default=None, description="Base URL of the dispatcher to register with; none by default."
    )
    dispatcher_token_file: AbsolutePath | None = Field(
        default=None, description="File with the bearer token for the dispatcher, in one line."
    )
    advertise_url: BaseUrl | None = Field(
        default=None, description="URL at which others reach this node; http://<listen_host>:<port> by default."
    )
    heartbeat_interval_s: float = Field(
        default=10.0, ge=1, le=300, description="Interval of heartbeats in seconds; the dispatcher may choose another."
    )
    llama_server_bin: Command | None = Field(
        default=None,
        description="The llama-server to run, by path or by name on PATH; "
        "by default llama-server on PATH, else the one of the demo extra.",
    )
    llama_server_startup_timeout_s: float = Field(
        default=30.0,
        gt=0,
        le=DAY_S,
        description="How long a request waits for a server to become ready, from its spawn, in seconds.",
    )
    llama_server_startup_limit_s: float = Field(
        default_factory=lambda data: 10 * float(data["llama_server_startup_timeout_s"]),
        gt=0,
        le=10 * DAY_S,
        description="When a start that is still not ready is given up, in seconds; ten times the time-out by default.",
    )
    llama_server_probe_interval_s: float = Field(
        default=0.5,
        ge=0.01,
        le=60,
        description="Longest interval between two readiness probes of a starting server, in seconds.",
    )
    llama_server_stop_grace_s: float = Field(
        default=5.0,
        ge=0,
        le=HOUR_S,
        description="How long a server may take to stop after SIGTERM before it is killed, in seconds.",
    )
    restart: RestartConfig = Field(default_factory=RestartConfig, description="When a server that ended is restarted.")
    stall_timeout_s: float = Field(
        default=120.0,
        ge=1,
        le=DAY_S,
        description="A busy server that shows no progress for this long is replaced, in seconds.",
    )
    memory_settle_timeout_s: float = Field(
        default=5.0,
        ge=0,
        le=HOUR_S,
        description="Longest wait before a load for a GPU's memory to be freed by the previous server, in seconds.",
    )
    memory_reserve_bytes: int = Field(
        default=0,
        ge=0,
        le=_MEMORY_MAX,
        description="Memory of each device that is kept free for other programs: models are fitted into the rest.",
    )
    max_pending_requests_per_device: int = Field(
        default=2,
        ge=1,
        le=100_000,
        description="Requests in flight and queued per device; one more is refused with 429. The default suits nodes "
        "behind a balancer or dispatcher: one in flight and one queued. Chat UIs send several requests at once: 8 "
        "suits them.",
    )
    max_models_per_device: int = Field(
        default=1,
        ge=1,
        le=_MODELS_MAX,
        description="Models that may be loaded on a device at the same time, each in a server of its own, where the "
        "memory allows. When room is needed, the models go that are cheap to load again for the time they were idle.",
    )
    concurrent_models: bool = Field(
        default=False,
        description="Models that are loaded on the same device serve requests at the same time; otherwise one model "
        "at a time is in use.",
    )
    queue_timeout_s: float = Field(
        default=300.0,
        gt=0,
        le=DAY_S,
        description="How long a request may wait for its turn before it is refused with 504, in seconds.",
    )
    stream_ping_s: float = Field(
        default=15.0,
        ge=0,
        le=HOUR_S,
        description="A stream that still waits for its first byte gets a comment this often, in seconds, so that no "
        "proxy cuts it; 0 for never.",
    )
    scheduling: Literal["swap_aware", "fifo"] = Field(
        default="swap_aware",
        description="Order of a device's requests: swap_aware needs few switches of models, fifo is strictly in order.",
    )
    swap_fairness_s: float = Field(
        default=30.0,
        gt=0,
        le=DAY_S,
        description="Longest time that later requests may go ahead of a request, in seconds.",
    )
    min_residency_s: float = Field(
        default=2.0,
        ge=0,
        le=DAY_S,
        description="Shortest turn of a loaded model while requests for others are queued, in seconds.",
    )
    abandoned_load_grace_s: float = Field(
        default=30.0,
        ge=0,
        le=DAY_S,
        description="How long a load goes on after the last request that waited for it has left, in seconds.",
    )
    max_request_bytes: int = Field(default=64 * 2**20, ge=1, le=64 * GIB, description="Largest request body in bytes.")
    api_keys: Annotated[tuple[ApiKeyConfig, ...], AsTuple] = Field(
        default=(),
        description="Who may use the node. With at least one key, here or made by `rolemesh-node-agent keys add`, "
        "every request but a health check needs one.",
    )
    allow_unauthenticated: bool = Field(
        default=False,
        description="Allow a `listen_host` that is not on loopback without any API key. Whoever reaches the node may "
        "then use it.",
    )
    tls_cert: AbsolutePath | None = Field(
        default=None,
        description="PEM file with the node's certificate, followed by those between it and its authority. The address "
        "then speaks TLS only, with HTTP/2 or HTTP/1.1 as the client asks. Read again on reload.",
    )
    tls_key: AbsolutePath | None = Field(
        default=None, description="PEM file with the private key of `tls_cert`, without a passphrase."
    )
    tls_client_ca: AbsolutePath | None = Field(
        default=None,
        description="PEM file of certificate authorities. Clients must show a certificate of one of them; those on "
        "this host need none.",
    )
    allow_remote_media: bool = Field(
        default=False,
        description="Let requests name images, sounds and files by URL. The servers fetch them, from wherever this "
        "host reaches.",
    )
    cors_origins: Annotated[tuple[Origin, ...], AsTuple] = Field(
        default=(), description="Web pages that may use the API, by origin, like https://chat.example; none by default."
    )
    allowed_hosts: Annotated[tuple[HostName, ...], AsTuple] = Field(
        default=(),
        description="Names, besides the host's own, by which browsers may reach this node: those that a reverse proxy "
        "passes on in Host. IP addresses and localhost always work.",
    )
    otlp_endpoint: BaseUrl | None = Field(
        default=None,
        description="Where traces are sent by OTLP over HTTP, like http://127.0.0.1:4318; none by default. Needs the "
        "extra `otel`.",
    )
    activity: ActivityConfig = Field(
        default_factory=ActivityConfig, description="Records of what each request took, without its content by default."
    )
    page: bool = Field(
        default=True, description="Serve the page at / to browsers, by which people look at the node and operate it."
    )
    preload_ready_timeout_s: float = Field(
        default=300.0, ge=0, le=DAY_S, description="How long /readyz waits for the models with `preload`, in seconds."
    )
    drain_grace_s: float = Field(
        default=5.0,
        ge=0,
        le=HOUR_S,
        description="How long requests are still accepted after SIGTERM or `drain`, in seconds.",
    )
    shutdown_timeout_s: float = Field(
        default=30.0, ge=0, le=DAY_S, description="How long requests in flight may take after that, in seconds."
    )
    backend: Literal["auto", "cpu", "cuda", "rocm", "sycl", "vulkan", "metal"] = Field(
        default="auto",
        description="How devices are found and pinned; auto uses the GPUs that llama-server lists, else the CPU.",
    )
    devices: Annotated[tuple[DeviceConfig, ...], AsTuple] = Field(
        default=(), description="Devices to use; by default all that the backend finds."
    )
    models: Annotated[tuple[ModelConfig, ...], AsTuple] = Field(
        min_length=1, description="Models that this node serves."
    )

    _source: Source | None = PrivateAttr(default=None)

    @property
    def source(self) -> Source:
        """The file that this was read from; an empty source if it was made in code."""
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
        return next((model for model in self.models if name in (model.model_id, *model.names)), None)

    def problem(self, path: KeyPath, message: str) -> Problem:
        """A problem with that key, with its file and line where this configuration came from one."""
        return self.source.problem(path, message)
