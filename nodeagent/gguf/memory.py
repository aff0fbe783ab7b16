"""How much memory a server of a model needs, from the model's header and the server's settings. Pure.

Rather too little than too much: a model that is tried in vain fails with a reason, but one that is refused wrongly
can't be used at all. The cache is what llama.cpp allocates, to the byte; the compute buffer is a lower bound.
Read from llama.cpp b11434 (src/llama-context.cpp, llama-kv-cache*.cpp, llama-memory-recurrent.cpp).
"""

from collections.abc import Mapping
from typing import Final

import msgspec

from nodeagent.gguf.cache_shape import CacheShape
from nodeagent.gguf.header import GgufHeader

# The context to which llama-server shrinks by itself if memory is short and none was requested (--fit, --fit-ctx).
LEAST_CTX: Final = 4096
_DEFAULT_BATCH: Final = 2048
_DEFAULT_UBATCH: Final = 512
_CELLS: Final = 256  # caches are padded to a multiple of this
_STATE_BYTES: Final = 4  # recurrent states are f32

# Bytes and numbers of a block, of the types that a cache may have.
CACHE_TYPES: Final[Mapping[str, tuple[int, int]]] = {
    "f32": (4, 1),
    "f16": (2, 1),
    "bf16": (2, 1),
    "q8_0": (34, 32),
    "q5_1": (24, 32),
    "q5_0": (22, 32),
    "q4_1": (20, 32),
    "q4_0": (18, 32),
    "iq4_nl": (18, 32),
}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The settings of llama-server that its memory depends on.

    `ctx_size` is `-c`, which all slots share: None counts `least_ctx`, the least context that llama-server picks by
    itself, and 0 that of the model. Each of `parallel` slots has a cache of its own unless it is `unified`. `cache_k`
    and `cache_v` are keys of CACHE_TYPES.
    """

    ctx_size: int | None = None
    least_ctx: int = LEAST_CTX
    parallel: int = 1
    unified: bool = False
    batch_size: int | None = None
    ubatch_size: int | None = None
    cache_k: str = "f16"
    cache_v: str = "f16"
    swa_full: bool = False
    flash_attn: bool = True


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes: the weights, KV caches and recurrent states, the compute buffer, and what is loaded beside the model."""

    weights: int
    cache: int
    compute: int
    beside: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.compute + self.beside


def estimate(header: GgufHeader, settings: Settings) -> Memory | None:
    """The memory of a server with the whole model on one device; None if nothing is known of its architecture, or of
    the types of its cache."""
    shape = header.cache
    if shape is None or not {settings.cache_k, settings.cache_v} <= CACHE_TYPES.keys():
        return None
    ctx = _cells(header, settings)
    streams = 1 if settings.unified else settings.parallel
    cells = _padded(ctx) if streams == 1 else _padded(_padded(ctx) // streams)
    ubatch = min(settings.ubatch_size or _DEFAULT_UBATCH, settings.batch_size or _DEFAULT_BATCH, cells * streams)
    windowed = _windowed_cells(shape, settings, cells, ubatch)
    return Memory(
        weights=header.size_bytes,
        cache=streams * _cache_bytes(shape, settings, cells, windowed) + settings.parallel * shape.state * _STATE_BYTES,
        compute=_compute_bytes(header, shape, settings, ubatch, cells, windowed),
    )


def _cells(header: GgufHeader, settings: Settings) -> int:
    if settings.ctx_size is None:
        return min(header.ctx_train, settings.least_ctx)
    return settings.ctx_size or header.ctx_train


def _padded(cells: int) -> int:
    return -(-cells // _CELLS) * _CELLS


def _windowed_cells(shape: CacheShape, settings: Settings, cells: int, ubatch: int) -> int:
    """The cells of a layer with a window."""
    if settings.swa_full:
        return cells
    window = shape.window * (settings.parallel if settings.unified else 1)
    return _padded(min(cells, window + ubatch))


def _cache_bytes(shape: CacheShape, settings: Settings, cells: int, windowed_cells: int) -> int:
    """Of one stream."""
    total = 0
    for numbers, kind in ((shape.keys, settings.cache_k), (shape.values, settings.cache_v)):
        size, count = CACHE_TYPES[kind]
        of_layer = zip(numbers, shape.windowed, strict=True)
        kept = sum(number * (windowed_cells if windowed else cells) for number, windowed in of_layer)
        total += kept * size // count
    return total


def _compute_bytes(
    header: GgufHeader, shape: CacheShape, settings: Settings, ubatch: int, cells: int, windowed_cells: int
) -> int:
    """For each token of a batch some rows of activations, in f32, and for each kind of cache a row of the attention
    mask, in f16. Models of 0.1 to 135 M parameters needed 8 to 12 rows, and encoders 6 (builds b10068 and b10434,
    flash attention).

    Without flash attention the products of all queries and keys of a layer are kept, in f32.
    """
    kept = [cells] if False in shape.windowed else []
    kept += [windowed_cells] if True in shape.windowed else []
    products = 0 if settings.flash_attn else 4 * header.heads * max(kept, default=0)
    rows = 8 if kept or shape.state else 6
    return ubatch * (2 * sum(kept) + rows * 4 * header.embedding_length + products)
