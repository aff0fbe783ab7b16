"""What a model keeps between tokens, as llama.cpp does it: the KV cache of each layer, and recurrent states.

Whether a layer has a window, or a state instead of a cache, is written in llama.cpp's code for each architecture and
not always in the file. So only architectures that are listed here have a shape; of any other nothing is claimed.
Read from llama.cpp b11434 (src/llama-model.cpp, src/models, src/llama-hparams.cpp).
"""

from collections.abc import Mapping
from enum import Enum, auto
from typing import Final

import msgspec

from nodeagent.gguf.metadata import Metadata


class CacheShape(msgspec.Struct, frozen=True, kw_only=True):
    """Numbers that are kept. `keys` and `values` have one entry for each layer: the numbers for each token.

    Layers that are `windowed` keep only the last `window` tokens. `state` is the total of all recurrent layers, for
    each sequence and not for each token.
    """

    keys: tuple[int, ...] = ()
    values: tuple[int, ...] = ()
    windowed: tuple[bool, ...] = ()
    window: int = 0
    state: int = 0


class _Kept(Enum):
    """The families."""

    ATTENTION = auto()
    HYBRID = auto()
    STATE = auto()
    NOTHING = auto()


class _Windows(msgspec.Struct, frozen=True):
    """Of `period` layers the last one sees everything, the first one with `dense_first`; the others have a window.

    `default` is the window of a file that names none: then there are none at all if it is 0.
    """

    period: int
    dense_first: bool = False
    default: int = 0


# A KV cache in every layer, with no window (also where the file names one, as those of Phi-3 do).
_PLAIN: Final = """
    llama deci falcon grok gpt2 gptj gptneox mpt baichuan starcoder starcoder2 refact bloom stablelm qwen qwen2 qwen2moe
    qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe phi2 phi3 phimoe plamo codeshell orion internlm2 minicpm minicpm3 gemma
    xverse command-r dbrx olmo olmoe openelm arctic deepseek deepseek2 chatglm glm4 glm4moe bitnet jais nemotron exaone
    granite granitemoe chameleon plm bailingmoe bailingmoe2 dots1 arcee ernie4_5 ernie4_5-moe hunyuan-moe hunyuan-dense
    smollm3 seed_oss grovemoe apertus minimax-m2 cogvlm pangu-embedded mistral3
"""
_WINDOWED: Final[Mapping[str, _Windows]] = {
    "gemma2": _Windows(2, default=4096),
    "gemma3": _Windows(6),
    "gemma3n": _Windows(5),
    "gemma4": _Windows(6),
    "cohere2": _Windows(4),
    "gpt-oss": _Windows(2),
    "llama4": _Windows(4, default=8192),
    "olmo2": _Windows(4),
    "afmoe": _Windows(4),
    "smallthinker": _Windows(4, dense_first=True),
}
# Attention in some layers, a state in the others: those without heads.
_HYBRID: Final = (
    "jamba granitehybrid nemotron_h nemotron_h_moe lfm2 lfm2moe plamo2 qwen3next qwen35 qwen35moe falcon-h1"
)
_INTERVAL: Final = frozenset({"qwen3next", "qwen35", "qwen35moe"})
_RECURRENT: Final = "mamba mamba2 rwkv6 rwkv6qwen2 rwkv7 arwkv7"
# They see their whole input at once.
_NO_CACHE: Final = """
    bert nomic-bert nomic-bert-moe jina-bert-v2 jina-bert-v3 modern-bert neo-bert eurobert gemma-embedding dream llada
    llada-moe rnd1
"""

_HOW_KEPT: Final = {
    **dict.fromkeys((*_PLAIN.split(), *_WINDOWED), _Kept.ATTENTION),
    **dict.fromkeys(_HYBRID.split(), _Kept.HYBRID),
    **dict.fromkeys(_RECURRENT.split(), _Kept.STATE),
    **dict.fromkeys(_NO_CACHE.split(), _Kept.NOTHING),
}


def cache_shape(metadata: Metadata, layers: int, width: int) -> CacheShape | None:
    """The shape for a model of so many layers and numbers in a token's row; None for an unknown architecture."""
    match _HOW_KEPT.get(metadata.architecture):
        case _Kept.NOTHING:
            return CacheShape()
        case _Kept.STATE:
            return CacheShape(state=layers * _state(metadata, width))
        case _Kept.HYBRID:
            return _hybrid(metadata, layers, width)
        case _Kept.ATTENTION:
            return _attention(metadata, layers, width)
        case None:
            return None


def _attention(metadata: Metadata, layers: int, width: int) -> CacheShape:
    heads = _heads_kv(metadata, layers)
    window, windowed = _windows(metadata, layers)
    key = metadata.number("{arch}.attention.key_length") or _head_length(metadata, layers, width)
    value = metadata.number("{arch}.attention.value_length") or _head_length(metadata, layers, width)
    if _is_compressed(metadata):
        rank = metadata.number("{arch}.attention.kv_lora_rank") or 0
        key, value = rank + (metadata.number("{arch}.rope.dimension_count") or 0) if rank else key, 0
        heads = tuple(min(count, 1) for count in heads)
    key_windowed = metadata.number("{arch}.attention.key_length_swa") or key
    value_windowed = metadata.number("{arch}.attention.value_length_swa") or value
    owning = _layers_with_a_cache(metadata, layers)
    of_layer = [(count if layer < owning else 0, windowed[layer]) for layer, count in enumerate(heads)]
    return CacheShape(
        keys=tuple(count * (key_windowed if short else key) for count, short in of_layer),
        values=tuple(count * (value_windowed if short else value) for count, short in of_layer),
        windowed=windowed,
        window=window,
    )


def _hybrid(metadata: Metadata, layers: int, width: int) -> CacheShape:
    heads = _heads_kv(metadata, layers)
    interval = metadata.number("{arch}.full_attention_interval") or 4
    if metadata.architecture in _INTERVAL:
        heads = tuple(count if (layer + 1) % interval == 0 else 0 for layer, count in enumerate(heads))
    feed_forward = metadata.by_layer("{arch}.feed_forward_length", layers) or (0,) * layers
    if metadata.architecture == "falcon-h1":
        recurrent = layers  # both in every layer
    elif metadata.architecture.startswith("nemotron_h"):
        recurrent = sum(not count and not length for count, length in zip(heads, feed_forward, strict=True))
    else:
        recurrent = heads.count(0)
    key = metadata.number("{arch}.attention.key_length") or _head_length(metadata, layers, width)
    value = metadata.number("{arch}.attention.value_length") or _head_length(metadata, layers, width)
    return CacheShape(
        keys=tuple(count * key for count in heads),
        values=tuple(count * value for count in heads),
        windowed=(False,) * layers,
        state=recurrent * _state(metadata, width),
    )


def _state(metadata: Metadata, width: int) -> int:
    """The numbers of one recurrent layer: the last columns of its convolution, and its state."""
    head = metadata.number("{arch}.wkv.head_size")
    if head:
        return ((metadata.number("{arch}.token_shift_count") or 2) + head) * width
    short = metadata.number("{arch}.shortconv.l_cache")
    if short:
        return width * (short - 1)
    inner = metadata.number("{arch}.ssm.inner_size") or 0
    state = metadata.number("{arch}.ssm.state_size") or 0
    groups = metadata.number("{arch}.ssm.group_count") or 0
    columns = max(0, (metadata.number("{arch}.ssm.conv_kernel") or 0) - 1)
    return columns * (inner + 2 * groups * state) + state * inner


def _heads_kv(metadata: Metadata, layers: int) -> tuple[int, ...]:
    own = metadata.by_layer("{arch}.attention.head_count_kv", layers)
    return own or metadata.by_layer("{arch}.attention.head_count", layers) or (0,) * layers


def _head_length(metadata: Metadata, layers: int, width: int) -> int:
    most = max(metadata.by_layer("{arch}.attention.head_count", layers) or (0,))
    return width // most if most else 0


def _is_compressed(metadata: Metadata) -> bool:
    """Multi-head latent attention: one row for keys and values together (older files of these models have none)."""
    lengths = ("{arch}.attention.key_length_mla", "{arch}.attention.value_length_mla")
    return all(metadata.number(key) for key in lengths)


def _layers_with_a_cache(metadata: Metadata, layers: int) -> int:
    """The first layers; those after them share a cache with one of them, or predict further tokens."""
    if metadata.architecture == "gemma3n":
        return min(layers, 20)
    shared = metadata.number("{arch}.attention.shared_kv_layers", most=layers) or 0
    predicting = metadata.number("{arch}.nextn_predict_layers", most=layers) or 0
    return layers - shared - predicting


def _windows(metadata: Metadata, layers: int) -> tuple[int, tuple[bool, ...]]:
    """The window, and for each layer whether it has it: by the file's pattern (a flag for each layer, or a period),
    else by the architecture's."""
    known = _WINDOWED.get(metadata.architecture)
    given = metadata.number("{arch}.attention.sliding_window")
    window = 0 if known is None else known.default if given is None else given
    if known is None or window == 0:
        return 0, (False,) * layers
    if metadata.architecture == "llama4":
        window = known.default  # the file's number is not used
    pattern = metadata.value("{arch}.attention.sliding_window_pattern")
    if isinstance(pattern, tuple) and pattern:
        return window, tuple(bool(pattern[layer % len(pattern)]) for layer in range(layers))
    period = pattern if isinstance(pattern, int) and pattern >= 0 else known.period
    seeing_all = 0 if known.dense_first else period - 1
    return window, tuple(period == 0 or layer % period != seeing_all for layer in range(layers))
