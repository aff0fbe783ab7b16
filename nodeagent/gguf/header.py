"""What a model file says about the model: its size, its shape, and from these an estimate of the memory it needs."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nodeagent.gguf.file import GgufError, Value, read_part

__all__ = ["GgufError", "GgufHeader", "read_header"]

# llama.cpp accepts no more than 512 (LLAMA_MAX_LAYERS).
_MAX_LAYERS: Final = 4096

_PART: Final = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

# The context to which llama-server shrinks by itself if memory is short and none was requested (--fit, --fit-ctx).
_LEAST_CTX: Final = 4096
_DEFAULT_UBATCH: Final = 512
# The KV cache is f16 by default.
_KV_ELEMENT_BYTES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufHeader:
    """What the metadata says. `size_bytes` is the whole model, all parts of a split one; lengths are in elements.

    `heads_kv` has one entry for each layer, 0 for a layer without attention; `layers_windowed` is how many layers keep
    no more than the last `window` tokens.
    """

    size_bytes: int
    layers: int
    ctx_train: int
    embedding_length: int
    heads_kv: tuple[int, ...]
    key_length: int
    value_length: int
    window: int | None
    layers_windowed: int

    def estimate_bytes(self, ctx_size: int | None = None, parallel: int = 1, ubatch_size: int | None = None) -> int:
        """The memory that a server of this model needs: weights, KV cache and compute buffer.

        Rather too little than too much: a model that is tried in vain fails with a reason, but one that is refused
        wrongly can't be used at all. `ctx_size` is llama-server's `-c`, which all slots share; None counts the least
        context that llama-server picks by itself. `ubatch_size` is its `-ub`, None for the default.
        """
        ctx = ctx_size or min(self.ctx_train, _LEAST_CTX)
        ubatch = ubatch_size or _DEFAULT_UBATCH
        ctx_windowed = min(ctx, (self.window or ctx) * parallel + ubatch)
        ctx_of_layers = ctx * (self.layers - self.layers_windowed) + ctx_windowed * self.layers_windowed
        kv_elements = sum(self.heads_kv) * (self.key_length + self.value_length) * ctx_of_layers // self.layers
        # For each token of a batch a row of the attention mask, in f16, and some rows of activations, in f32. Models of
        # 0.1 to 135 M parameters needed 8 to 12 of these (build b10434, flash attention).
        compute = min(ubatch, ctx) * (2 * ctx + 8 * 4 * self.embedding_length)
        return self.size_bytes + kv_elements * _KV_ELEMENT_BYTES + compute


def read_header(path: Path) -> GgufHeader:
    """Read the header of the model at `path`; if it is split, those of all its parts, which are in the same folder.

    Blocks on the disk, for up to a tenth of a second with a large vocabulary. Raises GgufError, and nothing else, for a
    file that is missing, unreadable, no GGUF file, or shorter than its tensors.
    """
    first = read_part(path)
    metadata = _Metadata(path, first.values)
    parts = [first, *(read_part(part) for part in _other_parts(path, metadata))]
    return _header(path, metadata, sum(part.size_bytes for part in parts))


class _Metadata:
    """Values by key, with their types checked; `{arch}` in a key stands for the name of the architecture."""

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
            raise GgufError(self._path, f"has no {self._full(key)}: not a model that llama.cpp can load")
        return value

    def by_layer(self, key: str, layers: int) -> tuple[int, ...] | None:
        """One number for each layer; the file has either these or a single one for all layers."""
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
        return GgufError(self._path, f"damaged: invalid value of {self._full(key)}")


def _other_parts(path: Path, metadata: _Metadata) -> list[Path]:
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


def _header(path: Path, metadata: _Metadata, size_bytes: int) -> GgufHeader:
    if not metadata.architecture:
        raise GgufError(path, "has no architecture: not a model")
    layers = metadata.required("{arch}.block_count", most=_MAX_LAYERS)
    width = metadata.required("{arch}.embedding_length")
    heads = metadata.by_layer("{arch}.attention.head_count", layers) or (0,) * layers
    head_length = width // max(heads) if any(heads) else 0
    window = metadata.number("{arch}.attention.sliding_window") or None
    return GgufHeader(
        size_bytes=size_bytes,
        layers=layers,
        ctx_train=metadata.required("{arch}.context_length"),
        embedding_length=width,
        heads_kv=_heads_kv(metadata, layers) or heads,
        key_length=metadata.number("{arch}.attention.key_length") or head_length,
        value_length=metadata.number("{arch}.attention.value_length") or head_length,
        window=window,
        layers_windowed=_layers_windowed(metadata, layers) if window else 0,
    )


def _heads_kv(metadata: _Metadata, layers: int) -> tuple[int, ...] | None:
    heads = metadata.by_layer("{arch}.attention.head_count_kv", layers)
    # Hybrid models: only each n-th layer has attention, the others keep a small state.
    interval = metadata.number("{arch}.full_attention_interval")
    if heads is None or not interval:
        return heads
    return tuple(count if (layer + 1) % interval == 0 else 0 for layer, count in enumerate(heads))


def _layers_windowed(metadata: _Metadata, layers: int) -> int:
    """By the file's pattern (a flag for each layer, or the distance of layers without a window); without it, all.

    For some architectures the pattern is in llama.cpp and not in the file. Then this counts too many layers, and the
    estimate is too low.
    """
    pattern = metadata.value("{arch}.attention.sliding_window_pattern")
    if isinstance(pattern, tuple):
        return sum(bool(flag) for flag in pattern[:layers])
    return layers - layers // pattern if isinstance(pattern, int) and pattern > 0 else layers
