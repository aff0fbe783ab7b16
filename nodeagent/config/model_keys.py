"""The keys of one entry of `models`, and of `restart`, which the node has too."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from nodeagent.config.base import Keys
from nodeagent.config.checks import MAX_SLOTS
from nodeagent.config.problems import MODEL_NAME
from nodeagent.config.server_flags import FlagValue, with_files
from nodeagent.config.values import (
    AbsolutePath,
    AsTuple,
    Command,
    FlashAttn,
    GpuLayers,
    Label,
    ModelName,
    Parameters,
    ServerArg,
    TensorSplit,
    Threads,
    Variables,
    absolute,
    folder_of,
)
from nodeagent.gguf.header import Task

DAY_S = 24 * 3600.0
HOUR_S = 3600.0
GIB = 2**30
# llama-server reads its numbers as 32-bit integers.
_INT_MAX = 2**31 - 1


class LoraConfig(Keys):
    """One entry of `loras`; a path alone is one too."""

    path: AbsolutePath = Field(description="The adapter's GGUF file.")
    scale: float = Field(default=1.0, ge=-1000, le=1000, description="How strongly it is applied.")

    @field_validator("path")
    @classmethod
    def _without_separators(cls, value: Path) -> Path:
        if "," in str(value) or ":" in str(value):
            raise ValueError(f"must have no comma and no colon, which separate adapters for llama-server: {value}")
        return value


def _path_alone(value: object) -> object:
    return {"path": value} if isinstance(value, str) else value


_Lora = Annotated[LoraConfig, BeforeValidator(_path_alone, json_schema_input_type=str | LoraConfig)]


class RestartConfig(Keys):
    """`restart`, of the node or of one model: when a server that ended is started again."""

    max_restarts: int = Field(
        default=3,
        ge=0,
        le=100_000,
        description="A model fails on a device when its server ends more often than this within `period_s`.",
    )
    period_s: float = Field(
        default=60.0, gt=0, le=DAY_S, description="Period in which ends of a server are counted, in seconds."
    )
    backoff_initial_s: float = Field(
        default=1.0,
        gt=0,
        le=HOUR_S,
        description="Delay before the second restart, in seconds; it doubles with each further restart.",
    )
    backoff_max_s: float = Field(
        default=60.0, gt=0, le=DAY_S, description="Longest delay before a restart, in seconds."
    )
    reset_after_s: float = Field(
        default=300.0,
        ge=0,
        le=DAY_S,
        description="A server that has been ready for this long starts with a clean record, in seconds.",
    )
    cooldown_s: float = Field(
        default=60.0,
        ge=0,
        le=DAY_S,
        description="How long a failed model is refused before a request may start it again, in seconds.",
    )

    @field_validator("backoff_max_s")
    @classmethod
    def _max_after_initial(cls, value: float, info: ValidationInfo) -> float:
        initial_s = info.data.get("backoff_initial_s", 0.0)
        if value < initial_s:
            raise ValueError(f"must be at least backoff_initial_s ({initial_s:g}), found {value:g}")
        return value


class ModelConfig(Keys):
    """One entry of `models`. A key that is None is left to llama-server."""

    model_id: str = Field(pattern=MODEL_NAME, description="Name of the model in requests.")
    path: AbsolutePath = Field(description="The GGUF file; for a split model the first part.")
    roles: Annotated[tuple[Label, ...], AsTuple] = Field(
        default=(), description="Roles of the model in the mesh, such as planner; reported to the dispatcher."
    )
    ctx_size: int | None = Field(
        default=None,
        ge=0,
        le=_INT_MAX,
        description="Context size in tokens, shared by all slots (-c); 0 takes the size from the model.",
    )
    batch_size: int | None = Field(default=None, ge=1, le=_INT_MAX, description="Logical batch size in tokens (-b).")
    ubatch_size: int | None = Field(default=None, ge=1, le=_INT_MAX, description="Physical batch size in tokens (-ub).")
    threads: Threads | None = Field(default=None, description="CPU threads for generation (-t); -1 uses all cores.")
    threads_batch: Threads | None = Field(
        default=None, description="CPU threads for prompt processing (-tb); the same as `threads` by default."
    )
    gpu_layers: GpuLayers | None = Field(
        default=None, description="Number of layers to keep on the GPU (-ngl), or all, or auto (also -1)."
    )
    devices: Annotated[tuple[str, ...], AsTuple] = Field(
        default=(),
        description="The devices that the model may use; any one by default. With one entry, like [gpu:1], it runs "
        "only there; with several, like [gpu:0, gpu:1], one server spans them all.",
    )
    split_mode: Literal["none", "layer", "row", "tensor"] | None = Field(
        default=None, description="How the model is split across its `devices` (-sm); llama-server's default is layer."
    )
    main_gpu: int | None = Field(
        default=None,
        ge=0,
        le=_INT_MAX,
        description="Main GPU (-mg), as its place in `devices`, from 0; 0 for a model that does not span devices.",
    )
    tensor_split: TensorSplit | None = Field(
        default=None,
        description="Share of the model per device (-ts), in the order of `devices`, like [3, 1]; a model that does "
        "not span devices has one share.",
    )
    flash_attn: FlashAttn | None = Field(
        default=None, description="Flash attention (-fa): true, false, on, off or auto."
    )
    mmproj: AbsolutePath | None = Field(
        default=None, description="The GGUF file of the projector, for models that see or hear (--mmproj)."
    )
    draft_model: AbsolutePath | None = Field(
        default=None,
        description="The GGUF file of a small model that drafts tokens for this one (--spec-draft-model). Unless "
        "`server_args` has `spec_type`, it is draft-simple where llama-server has that flag.",
    )
    loras: Annotated[tuple[_Lora, ...], AsTuple] = Field(
        default=(), description="LoRA adapters to apply (--lora, --lora-scaled): paths, or mappings as below."
    )
    alias: str | None = Field(
        default=None,
        pattern=MODEL_NAME,
        description="Another name of the model in requests; answers name it by its `model_id`.",
    )
    aliases: Annotated[tuple[ModelName, ...], AsTuple] = Field(
        default=(), description="More names of the model in requests."
    )
    fallback: Annotated[tuple[ModelName, ...], AsTuple] = Field(
        default=(),
        description="Models, by `model_id`, of which the first that can serves its requests when it can't itself: it "
        "fits nowhere, has failed or is not ready in time. A full queue is no reason, and a stream that was told "
        "to wait (`stream_ping_s`) stays with its model.",
    )
    defaults: Parameters = Field(
        default={},
        description="Parameters of requests, such as temperature, that apply where a request does not have them.",
    )
    overrides: Parameters = Field(
        default={}, description="Parameters that all requests for the model get, whatever they have."
    )
    max_request_bytes: int | None = Field(
        default=None, ge=1, le=64 * GIB, description="Largest body of its requests; at most the node's."
    )
    queue_timeout_s: float | None = Field(
        default=None, gt=0, le=DAY_S, description="Overrides the node's `queue_timeout_s` for this model, in seconds."
    )
    task: Task | None = Field(
        default=None,
        description="What the model is for: chat, embedding or rerank. By default its file says so; embedding and "
        "rerank models get the flags that llama-server needs for it.",
    )
    default: bool = Field(
        default=False, description="The model for requests without `model`; a single model is the default anyway."
    )
    preload: bool = Field(
        default=False, description="Load the model when the agent starts instead of on its first request."
    )
    parallel: int = Field(
        default=1,
        ge=1,
        le=MAX_SLOTS,
        description="Slots: how many requests one server of the model handles at a time (-np).",
    )
    restart: RestartConfig | None = Field(
        default=None, description="Restart policy of this model; missing keys are taken from the node's `restart`."
    )
    stall_timeout_s: float | None = Field(
        default=None, ge=1, le=DAY_S, description="Overrides the node's `stall_timeout_s` for this model, in seconds."
    )
    idle_unload_s: float | None = Field(
        default=None,
        ge=0,
        le=30 * DAY_S,
        description="Unload the model after this time without a request, in seconds; never by default. A model with "
        "`preload` or `default` that it had displaced is loaded again.",
    )
    pinned: bool = Field(
        default=False,
        description="Once loaded, the model stays: its server never gives way to another model's.",
    )
    keep_kv: bool = Field(
        default=False,
        description="Save the server's KV cache to a file when another model is loaded, and restore it later.",
    )
    llama_server_bin: Command | None = Field(
        default=None, description="The llama-server of this model; the device's or the node's by default."
    )
    env: Variables = Field(
        default={}, description="Environment variables of the model's servers; they take precedence over the device's."
    )
    server_args: dict[str, ServerArg] = Field(
        default={},
        description="Any other flag of llama-server, written with _ or -: true gives a bare flag, false or null omits "
        "it, a list repeats it.",
    )

    @property
    def names(self) -> tuple[str, ...]:
        """Its names besides its id."""
        return (*((self.alias,) if self.alias else ()), *self.aliases)

    @field_validator("server_args")
    @classmethod
    def _resolve_files(cls, value: dict[str, FlagValue], info: ValidationInfo) -> dict[str, FlagValue]:
        """Files in flags are resolved like `path`."""
        folder = folder_of(info)
        return {name: with_files(name, one, lambda path: absolute(path, folder)) for name, one in value.items()}
