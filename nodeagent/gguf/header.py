"""What a model file says of itself: its size, its shape, and from these an estimate of the memory it takes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nodeagent.gguf.file import GgufError, SteppedOver, Value, read_part

__all__ = ["GgufError", "GgufHeader", "read_header"]

# llama.cpp takes no more than 512 (LLAMA_MAX_LAYERS).
_MAX_LAYERS: Final = 4096

# enum llama_pooling_type in llama.h
_POOLINGS: Final[Mapping[int, str]] = {0: "none", 1: "mean", 2: "cls", 3: "last", 4: "rank"}

_PART: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

# What llama-server goes down to by itself when memory is short and no context was asked for (--fit, --fit-ctx).
_LEAST_CTX: Final = 4096
_DEFAULT_UBATCH: Final = 512


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What the metadata says. `size_bytes` is the whole model, all parts of a split one.

    `heads_kv` has one entry for each layer, 0 for a layer without attention; `layers_windowed` is how many layers
    keep no more than the last `window` tokens. `pooling` is one of none, mean, cls, last, rank, None where the file
    says nothing or something new: mean, cls and last are of models made for embeddings, rank of rerankers.
    """

    path: Path
    size_bytes: int
    architecture: str
    name: str | None
    layers: int
    ctx_train: int
    embedding_length: int
    heads_kv: tuple[int, ...]
    key_length: int
    value_length: int
    vocab_size: int | None
    window: int | None
    layers_windowed: int
    pooling: str | None
    has_chat_template: bool

    def estimate_bytes(
        self,
        ctx_size: int | None = None,
        parallel: int = 1,
        *,
        kv_element_bytes: float = 2.0,
        ubatch_size: int = _DEFAULT_UBATCH,
    ) -> int:
        """The memory that a server of this model takes: weights, KV cache and compute buffer.

        Rather too little than too much: a model wrongly tried fails with a reason, one wrongly refused is no use to
        anybody. `ctx_size` is llama-server's `-c`, which all slots share; None counts the least that llama-server
        makes of it by itself. `kv_element_bytes` is 2 for f16, its default.
        """
        ctx = ctx_size or min(self.ctx_train, _LEAST_CTX)
        ctx_windowed = min(ctx, (self.window or ctx) * parallel + ubatch_size)
        ctx_of_layers = ctx * (self.layers - self.layers_windowed) + ctx_windowed * self.layers_windowed
        kv_elements = sum(self.heads_kv) * (self.key_length + self.value_length) * ctx_of_layers // self.layers
        # For each token of a batch a row of the attention mask, in f16, and some of activations, in f32. Models of
        # 0.1 to 135 M parameters took 8 to 12 of these rows (build b10434, flash attention).
        compute = min(ubatch_size, ctx) * (2 * ctx + 8 * 4 * self.embedding_length)
        return self.size_bytes + int(kv_elements * kv_element_bytes) + compute


def read_header(path: Path) -> GgufHeader:
    """Read the header of the model at `path`, for a split one those of all its parts, which lie beside it.

    Blocks on the disk, for up to a tenth of a second with large vocabularies. Raises GgufError, and nothing else,
    for a file that is missing, unreadable, no GGUF, or shorter than its tensors.
    """
    first = read_part(path)
    metadata = _Metadata(path, first.values)
    parts = [first, *(read_part(part) for part in _other_parts(path, metadata))]
    return _header(path, metadata, sum(part.size_bytes for part in parts))


class _Metadata:
    """Values by key, checked for their types; `{arch}` in a key stands for the architecture's name."""

    def __init__(self, path: Path, values: Mapping[str, Value]) -> None:
        self._path = path
        self._values = values
        self.architecture = self.text("general.architecture") or ""

    def text(self, key: str) -> str | None:
        value = self._values.get(key)
        if value is not None and not isinstance(value, str):
            raise self._unusable(key)
        return value

    def number(self, key: str, *, least: int = 0, most: int | None = None) -> int | None:
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, int) or value < least or (most is not None and value > most):
            raise self._unusable(key)
        return value

    def required(self, key: str, *, most: int | None = None) -> int:
        value = self.number(key, least=1, most=most)
        if value is None:
            raise GgufError(self._path, f"it has no {self._full(key)}: not a model that llama.cpp can load")
        return value

    def by_layer(self, key: str, layers: int) -> tuple[int, ...] | None:
        """One number for each layer, written as such or as one for all."""
        value = self.value(key)
        if value is None:
            return None
        values = value if isinstance(value, tuple) else (value,) * layers
        numbers = tuple(number for number in values[:layers] if isinstance(number, int) and number >= 0)
        if len(numbers) != layers:
            raise self._unusable(key)
        return numbers

    def value(self, key: str) -> Value:
        return self._values.get(self._full(key))

    def _full(self, key: str) -> str:
        return key.replace("{arch}", self.architecture)

    def _unusable(self, key: str) -> GgufError:
        return GgufError(self._path, f"damaged: an unusable value of {self._full(key)}")


def _other_parts(path: Path, metadata: _Metadata) -> list[Path]:
    """The parts beside the first, by the names that llama.cpp's gguf-split gives them: only the first tells all."""
    count = metadata.number("split.count", most=99_999) or 1
    if count == 1:
        return []
    named = _PART.fullmatch(path.name)
    if named is None or int(named["count"]) != count:
        raise GgufError(path, f"the first of {count} parts: its name must end in -00001-of-{count:05}.gguf")
    if int(named["number"]) != 1:
        raise GgufError(path, f"part {int(named['number'])} of {count}: name the first")
    return [path.with_name(f"{named['stem']}-{number:05}-of-{count:05}.gguf") for number in range(2, count + 1)]


def _header(path: Path, metadata: _Metadata, size_bytes: int) -> GgufHeader:
    if not metadata.architecture:
        raise GgufError(path, "it names no architecture: not a model")
    layers = metadata.required("{arch}.block_count", most=_MAX_LAYERS)
    width = metadata.required("{arch}.embedding_length")
    heads = metadata.by_layer("{arch}.attention.head_count", layers) or (0,) * layers
    head_length = width // max(heads) if any(heads) else 0
    vocabulary = metadata.value("tokenizer.ggml.tokens")
    pooling = metadata.number("{arch}.pooling_type")
    window = metadata.number("{arch}.attention.sliding_window") or None
    return GgufHeader(
        path=path,
        size_bytes=size_bytes,
        architecture=metadata.architecture,
        name=metadata.text("general.name"),
        layers=layers,
        ctx_train=metadata.required("{arch}.context_length"),
        embedding_length=width,
        heads_kv=_heads_kv(metadata, layers) or heads,
        key_length=metadata.number("{arch}.attention.key_length") or head_length,
        value_length=metadata.number("{arch}.attention.value_length") or head_length,
        vocab_size=vocabulary.count if isinstance(vocabulary, SteppedOver) else metadata.number("{arch}.vocab_size"),
        window=window,
        layers_windowed=_layers_windowed(metadata, layers) if window else 0,
        pooling=_POOLINGS.get(pooling) if pooling is not None else None,
        has_chat_template=bool(metadata.text("tokenizer.chat_template")),
    )


def _heads_kv(metadata: _Metadata, layers: int) -> tuple[int, ...] | None:
    heads = metadata.by_layer("{arch}.attention.head_count_kv", layers)
    # Hybrids: only each n-th layer attends, the others keep a small state.
    interval = metadata.number("{arch}.full_attention_interval")
    if heads is None or not interval:
        return heads
    return tuple(count if (layer + 1) % interval == 0 else 0 for layer, count in enumerate(heads))


def _layers_windowed(metadata: _Metadata, layers: int) -> int:
    """By the file's pattern, a flag for each layer or the distance of full ones; without one, all of them.

    Files of some architectures leave the pattern to llama.cpp, and then this counts too many: see estimate_bytes.
    """
    pattern = metadata.value("{arch}.attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return sum(bool(flag) for flag in pattern[:layers])
    return layers - layers // pattern if isinstance(pattern, int) and pattern > 0 else layers
