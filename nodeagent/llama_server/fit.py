"""Whether a model fits on a device, or on those that it spans, from its header and its configuration. Pure.

On a CPU mapped weights do not count: all servers share them, and the system reclaims the memory if it needs it.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from msgspec.structs import replace

from nodeagent.config import ModelConfig, NodeConfig
from nodeagent.config.server_flags import FlagValue, find_flag, sets_flag
from nodeagent.devices.values import DeviceRef
from nodeagent.gguf.header import GgufHeader
from nodeagent.gguf.memory import LEAST_CTX, Memory, Settings, estimate

# These flags keep a part of the weights off the device (say, the experts of a large model in the host's memory).
_MOVE_WEIGHTS: Final = ("cpu-moe", "n-cpu-moe", "override-tensor")
_ALL_LAYERS: Final = 2**31 - 1
_GIB: Final = 2**30
_MIB: Final = 2**20


class Fit(msgspec.Struct, frozen=True):
    """What a model takes of a device's memory, and why it is known not to fit there, None if it may.

    `least_bytes` has to be free at least, since a load ran out of memory; None if none did. `measured`: what it takes
    was measured, and is no estimate.
    """

    needed_bytes: int
    misfit: str | None
    least_bytes: int | None = None
    measured: bool = False


def fit_of(
    header: GgufHeader,
    model: ModelConfig,
    device: DeviceRef,
    measured_bytes: int | None,
    least_bytes: int | None = None,
) -> Fit:
    """How the model fits on the device. A measurement of an earlier load there beats the estimate."""
    fit = _fit_of(header, model, device, measured_bytes)
    if least_bytes is None:
        return fit
    usable, misfit_said = usable_bytes(model, device), fit.misfit
    if misfit_said is None and usable is not None and least_bytes > usable:
        has = _capacity(model, device)
        misfit_said = f"needs more than {readable(least_bytes)}, as a load showed that failed, and {has}"
    return replace(fit, needed_bytes=max(fit.needed_bytes, least_bytes), misfit=misfit_said, least_bytes=least_bytes)


def _fit_of(header: GgufHeader, model: ModelConfig, device: DeviceRef, measured_bytes: int | None) -> Fit:
    if measured_bytes is None:
        return Fit(bytes_on_device(header, model, device), misfit(header, model, device))
    usable = usable_bytes(model, device)
    if usable is None or measured_bytes <= usable:
        return Fit(measured_bytes, None, measured=True)
    said = f"took {readable(measured_bytes)} when it was last loaded, and {_capacity(model, device)}"
    return Fit(measured_bytes, said, measured=True)


def usable_bytes(model: ModelConfig, device: DeviceRef) -> int | None:
    """How much a model may need on the device, None if unknown: what is not reserved for others. On devices that it
    spans each has to hold its share, if `tensor_split` says so."""
    totals = [part.memory_total_bytes for part in device.parts]
    usable = [total - part.memory_reserve_bytes for total, part in zip(totals, device.parts, strict=True) if total]
    if len(usable) < len(totals):
        return None
    shares = shares_of(model, device)
    if shares is None:
        return sum(usable)
    return min(int(room / share) for room, share in zip(usable, shares, strict=True) if share > 0)


def shares_of(model: ModelConfig, device: DeviceRef) -> tuple[float, ...] | None:
    """The part of the model on each of the devices that it spans, None if llama-server decides."""
    count = len(device.members)
    if _value(model, "split-mode") == "none":
        main = _number(model, "main-gpu") or 0
        return tuple(float(place == main) for place in range(count)) if count else None
    given = str(_value(model, "tensor-split") or "")
    shares = tuple(float(share) for share in re.split("[,/]", given)) if given else ()
    return tuple(share / sum(shares) for share in shares) if count and len(shares) == count else None


def part_on(model: ModelConfig, device: DeviceRef, span: DeviceRef | None) -> float:
    """Which part of a server of the model is on this device, if it spans it with others; without known shares in
    proportion to their memory."""
    if span is None:
        return 1.0
    place = [part.device_id for part in span.members].index(device.device_id)
    shares = shares_of(model, span)
    if shares is not None:
        return shares[place]
    total = span.memory_total_bytes
    return (device.memory_total_bytes or 0) / total if total else 1 / len(span.members)


def misfit(header: GgufHeader, model: ModelConfig, device: DeviceRef) -> str | None:
    """Why this model is known not to fit on this device, None if it may fit.

    llama-server by default offloads only as many layers to a GPU as fit, so a model is known not to fit only if all of
    its layers are requested there (`gpu_layers`). Nor is anything said of an unknown architecture.
    """
    usable = usable_bytes(model, device)
    needed = memory_on_device(header, model, device)
    if usable is None or needed is None:
        return None
    if device.backend != "cpu":
        layers = gpu_layers(model)
        if layers is None or layers < header.layers:
            return None
        if any(sets_flag(model.server_args, flag) for flag in _MOVE_WEIGHTS):
            needed = replace(needed, weights=0)
    if needed.total <= usable:
        return None
    return f"needs about {in_words(needed)}, and {_capacity(model, device)}"


def _capacity(model: ModelConfig, device: DeviceRef) -> str:
    """`the device has 8.0 GiB, of which 1.0 GiB are reserved for others`."""
    reserved = device.memory_reserve_bytes
    beside = f", of which {readable(reserved)} are reserved for others" if reserved else ""
    shares = shares_of(model, device)
    if shares is not None:
        split = " : ".join(f"{share:.0%}" for share in shares)
        each = ", ".join(f"{part.device_id} {readable(part.memory_total_bytes or 0)}" for part in device.members)
        return f"split {split} its devices have too little: {each}{beside}"
    has = "the devices have together" if device.members else "the device has"
    return f"{has} {readable(device.memory_total_bytes or 0)}{beside}"


def bytes_on_device(header: GgufHeader, model: ModelConfig, device: DeviceRef) -> int:
    """The estimated memory of one more server of the model on the device; the weights alone if more is not known."""
    needed = memory_on_device(header, model, device)
    if needed is not None:
        return needed.total
    if device.backend == "cpu":
        return 0 if _is_mapped(model, device) else header.size_bytes
    return header.size_bytes - header.host_bytes


def memory_on_device(header: GgufHeader, model: ModelConfig, device: DeviceRef) -> Memory | None:
    """What one more server of the model takes of the device's memory; None for an unknown architecture.

    What is loaded beside the model counts too: projectors and adapters are copied, also on a CPU. A draft model has as
    many tokens of context and as many slots as the model.
    """
    needed = _own_memory(header, model, device)
    if needed is None:
        return None
    drafting = None if header.draft is None else _draft_memory(header.draft, model, device)
    offloads = device.backend == "cpu" or _is_on(model, "mmproj-offload", default=True)
    beside = header.beside_bytes if offloads else 0
    return replace(needed, beside=beside + (drafting.total if drafting is not None else 0))


def _draft_memory(draft: GgufHeader, model: ModelConfig, device: DeviceRef) -> Memory | None:
    asked = settings(model)
    types = [_value(model, f"spec-draft-type-{kind}") for kind in ("k", "v")]
    needed = estimate(draft, replace(asked, cache_k=str(types[0] or "f16"), cache_v=str(types[1] or "f16")))
    if needed is None:
        return None
    if device.backend == "cpu":
        return replace(needed, weights=0) if _is_mapped(model, device) else needed
    return replace(needed, weights=needed.weights - draft.host_bytes)


def _own_memory(header: GgufHeader, model: ModelConfig, device: DeviceRef) -> Memory | None:
    needed = estimate(header, settings(model))
    if needed is None:
        return None
    if device.backend == "cpu":
        return replace(needed, weights=0) if _is_mapped(model, device) else needed
    needed = replace(needed, weights=needed.weights - header.host_bytes)
    if not _is_on(model, "kv-offload", default=True):
        needed = replace(needed, cache=0)
    layers = gpu_layers(model)
    if layers is None or layers >= header.layers:
        return needed
    part = layers / header.layers
    return replace(needed, weights=int(needed.weights * part), cache=int(needed.cache * part))


def shortage(
    header: GgufHeader | None,
    model: ModelConfig | None,
    device: DeviceRef,
    free_bytes: int | None,
    asked_bytes: int | None = None,
) -> str | None:
    """The figures for a model that ran out of the device's memory, None if there are none."""
    needed = memory_on_device(header, model, device) if header is not None and model is not None else None
    total = device.memory_total_bytes
    said = [] if needed is None else [f"the model needs about {in_words(needed)}"]
    said += [] if asked_bytes is None else [f"its server asked for {readable(asked_bytes)} at once"]
    said += [] if total is None else [f"the device has {readable(total)}"]
    said += [] if free_bytes is None else [f"{readable(free_bytes)} are free now"]
    return ", ".join(said) or None


def with_reserve(devices: Sequence[DeviceRef], config: NodeConfig) -> list[DeviceRef]:
    """The devices, with the memory that the configuration keeps free on each."""
    own = {device.device_id: device.memory_reserve_bytes for device in config.devices}
    given = [(device, own.get(device.device_id)) for device in devices]
    default = config.memory_reserve_bytes
    return [replace(device, memory_reserve_bytes=default if mine is None else mine) for device, mine in given]


def settings(model: ModelConfig) -> Settings:
    """The settings of the model's server that its memory depends on."""
    least_ctx = _number(model, "fit-ctx")
    ctx_size = _number(model, "ctx-size")
    if ctx_size is None and _value(model, "fit") in ("off", "false", "0"):
        ctx_size = 0
    return Settings(
        ctx_size=ctx_size,
        least_ctx=LEAST_CTX if least_ctx is None else least_ctx,
        parallel=model.parallel,
        unified=_is_on(model, "kv-unified", default=False),
        batch_size=_number(model, "batch-size"),
        ubatch_size=_number(model, "ubatch-size"),
        cache_k=str(_value(model, "cache-type-k") or "f16"),
        cache_v=str(_value(model, "cache-type-v") or "f16"),
        swa_full=_is_on(model, "swa-full", default=False),
        flash_attn=_value(model, "flash-attn") not in ("off", "false", "0"),
    )


def in_words(needed: Memory) -> str:
    """`41.1 GiB (40.0 GiB of weights + 1.0 GiB of KV cache + 80 MiB of compute buffer)`."""
    parts = {"weights": needed.weights, "KV cache": needed.cache, "compute buffer": needed.compute}
    parts["projector, adapters and draft model"] = needed.beside
    terms = [f"{readable(size)} of {name}" for name, size in parts.items() if size]
    return f"{readable(needed.total)} ({' + '.join(terms)})"


def readable(size: int) -> str:
    """`1.5 GiB`, `80 MiB`."""
    return f"{size / _GIB:.1f} GiB" if size >= _GIB else f"{size / _MIB:.0f} MiB"


def gpu_layers(model: ModelConfig) -> int | None:
    """How many layers are asked for on the GPU, at most; None if llama-server decides."""
    if _value(model, "gpu-layers") == "all":
        return _ALL_LAYERS
    count = _number(model, "gpu-layers")
    return count if count is not None and count >= 0 else None


def _is_mapped(model: ModelConfig, device: DeviceRef) -> bool:
    """Whether the weights are the page cache's and not the server's own."""
    if device.backend != "cpu":
        return False
    own = sets_flag(model.server_args, "mlock") or not _is_on(model, "mmap", default=True)
    return not own and _value(model, "load-mode") in (None, "mmap")


def _value(model: ModelConfig, name: str) -> FlagValue:
    """The value of that flag, from its key or from `server_args`, where the last of several counts. A list is joined
    by commas, as llama-server takes it."""
    flag = find_flag(name)
    if flag is not None and flag.key is not None and (structured := getattr(model, flag.key)) is not None:
        if isinstance(structured, tuple):
            return ",".join(map(str, structured))
        return _plain(structured)
    given: FlagValue = None
    for _, value in _given(model.server_args, name):
        given = value
    return given


def _number(model: ModelConfig, name: str) -> int | None:
    value = _value(model, name)
    try:
        return int(value) if isinstance(value, int | str) else None
    except ValueError:  # the server will complain
        return None


def _is_on(model: ModelConfig, name: str, *, default: bool) -> bool:
    """Whether a flag with a negative (`no-mmap`) is on."""
    is_on = default
    for spelling, _ in _given(model.server_args, name):
        is_on = not spelling.startswith("no-") and spelling != "nkvo"
    return is_on


def _given(server_args: Mapping[str, FlagValue], name: str) -> list[tuple[str, FlagValue]]:
    """What `server_args` says of that flag, with the spelling without dashes before it; the last of several values."""
    flag = find_flag(name)
    found = [(key.lstrip("-").replace("_", "-"), value) for key, value in server_args.items() if find_flag(key) == flag]
    lasts = [(key, value[-1] if isinstance(value, tuple) and value else value) for key, value in found]
    return [(key, value) for key, value in lasts if value is not None and value is not False]


def _plain(value: object) -> FlagValue:
    return value if isinstance(value, bool | int | float | str) else str(value)
