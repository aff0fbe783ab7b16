"""What a model file says about the model: its size and its shape."""

import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Final, Literal

import msgspec
from msgspec.structs import replace

from nodeagent.gguf.cache_shape import CacheShape, cache_shape
from nodeagent.gguf.file import LAYER_ROWS, OUTPUT_ROWS, TOKEN_ROWS, GgufError, read_part
from nodeagent.gguf.metadata import Metadata

__all__ = ["Companion", "GgufError", "GgufHeader", "Task", "read_companion", "read_header"]

Task = Literal["chat", "embedding", "rerank"]
"""What a model is made for."""

# llama.cpp accepts no more than 512 (LLAMA_MAX_LAYERS).
_MAX_LAYERS: Final = 4096

_PART: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

# enum llama_pooling_type in llama.h; 0 is none, and others make one embedding of all tokens.
_POOLING_RANK: Final = 4
# Architectures that can't generate, whether or not their file says how they pool.
_ENCODERS: Final = frozenset(
    {
        "bert",
        "eurobert",
        "gemma-embedding",
        "jina-bert-v2",
        "jina-bert-v3",
        "modern-bert",
        "neo-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "t5encoder",
    }
)


class GgufHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What the metadata says. `size_bytes` is the whole model, all parts of a split one.

    `embedding_length` is how many numbers a token's row has, `heads` the most attention heads of a layer. `cache` is
    None for an architecture of which nothing is known. `host_bytes` are the weights that stay in the host's memory even
    if all layers are on a GPU: rows that are looked up by token, unless they are the output head too. Of what is loaded
    beside the model, `beside_bytes` are the projector and LoRA adapters, and `draft` is the model that drafts tokens.
    `pools` is whether the file says how tokens become one embedding. `size_label` is the number of parameters in words
    ("8B"), "" if the file does not say.
    """

    size_bytes: int
    layers: int
    ctx_train: int
    embedding_length: int
    heads: int = 0
    cache: CacheShape | None = None
    host_bytes: int = 0
    beside_bytes: int = 0
    draft: "GgufHeader | None" = None
    pools: bool = False
    task: Task = "chat"
    architecture: str = ""
    size_label: str = ""


def read_header(path: Path) -> GgufHeader:
    """Read the header of the model at `path`; if it is split, those of all its parts, which are in the same folder.

    Blocks on the disk, for up to a tenth of a second with a large vocabulary. Raises GgufError, and nothing else, for a
    file that is missing, unreadable, no GGUF file, or shorter than its tensors.
    """
    first = read_part(path)
    metadata = Metadata(path, first.values)
    parts = [first, *(read_part(part) for part in _other_parts(path, metadata))]
    header = _header(path, metadata, sum(part.size_bytes for part in parts))
    return replace(
        header, host_bytes=_host_bytes({name: size for part in parts for name, size in part.tensors.items()})
    )


class Companion(Enum):
    """A file that is loaded beside a model and is none itself."""

    PROJECTOR = "projector (mmproj)"
    ADAPTER = "LoRA adapter"


def read_companion(path: Path, kind: Companion) -> int:
    """The size of such a file in bytes. Blocks and raises as `read_header` does, also for a file of another kind."""
    part = read_part(path)
    is_adapter = part.values.get("general.type") == "adapter"
    is_projector = part.values.get("general.architecture") == "clip"
    if not (is_projector if kind is Companion.PROJECTOR else is_adapter):
        raise GgufError(path, f"not a {kind.value}")
    return part.size_bytes


def _other_parts(path: Path, metadata: Metadata) -> list[Path]:
    """The parts besides the first, by the names that llama.cpp's gguf-split gives them; the first has all metadata."""
    count = metadata.number("split.count", most=99_999) or 1
    if count == 1:
        return []
    named = _PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise GgufError(path, f"the first of {count} parts: its name must end with -00001-of-{count:05}.gguf")
    if int(named["number"]) != 1:
        raise GgufError(path, f"part {int(named['number'])} of {count}: configure the first part")
    return [path.with_name(f"{named['stem']}-{number:05}-of-{count:05}.gguf") for number in range(2, count + 1)]


def _host_bytes(tensors: Mapping[str, int]) -> int:
    looked_up = tensors.get(LAYER_ROWS, 0)
    return looked_up + (tensors.get(TOKEN_ROWS, 0) if OUTPUT_ROWS in tensors else 0)


def _task(architecture: str, pooling: int) -> Task:
    if pooling == _POOLING_RANK:
        return "rerank"
    return "embedding" if pooling or architecture in _ENCODERS else "chat"


def _header(path: Path, metadata: Metadata, size_bytes: int) -> GgufHeader:
    if not metadata.architecture:
        raise GgufError(path, "has no architecture: not a model")
    layers = metadata.required("{arch}.block_count", most=_MAX_LAYERS)
    width = metadata.required("{arch}.embedding_length")
    heads = metadata.by_layer("{arch}.attention.head_count", layers) or (0,)
    pooling = metadata.number("{arch}.pooling_type") or 0
    return GgufHeader(
        size_bytes=size_bytes,
        layers=layers,
        ctx_train=metadata.required("{arch}.context_length"),
        embedding_length=width,
        heads=max(heads),
        cache=cache_shape(metadata, layers, width),
        pools=pooling != 0,
        task=_task(metadata.architecture, pooling),
        architecture=metadata.architecture,
        size_label=metadata.text("general.size_label") or "",
    )
