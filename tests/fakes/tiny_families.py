"""One tiny model of each family that keeps its cache in its own way, for the real llama-server to load.

They differ from `tiny_models` in that they say nothing: all weights are zero. What matters is that the server loads
them and reports what memory it took.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import gguf
import numpy

from fakes import tiny_models

Shapes = Mapping[str, tuple[int, ...]]

_VOCABULARY: Final = tiny_models.TinyModel(name="words", seed=0)
_VOCABULARY_SIZE: Final = 3 + 256 + _VOCABULARY.words


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model's metadata besides what all have, and the shapes of its tensors (rows first)."""

    architecture: str
    layers: int
    width: int = 64
    ctx_train: int = 8192
    numbers: Mapping[str, int | float | bool | list[int] | list[bool]]
    tensors: Shapes
    of_layer: Callable[[int], Shapes]

    @property
    def name(self) -> str:
        return self.architecture


def _attention(heads: int, heads_kv: int, length: int) -> Callable[[int], Shapes]:
    """Llama's layer with norms of queries and keys, and norms after each part."""

    def shapes(_layer: int) -> Shapes:
        return {
            "attn_norm": (64,),
            "attn_q": (heads * length, 64),
            "attn_k": (heads_kv * length, 64),
            "attn_v": (heads_kv * length, 64),
            "attn_q_norm": (length,),
            "attn_k_norm": (length,),
            "attn_output": (64, heads * length),
            "post_attention_norm": (64,),
            "ffn_norm": (64,),
            "ffn_gate": (128, 64),
            "ffn_up": (128, 64),
            "ffn_down": (64, 128),
            "post_ffw_norm": (64,),
        }

    return shapes


def _compressed(_layer: int) -> Shapes:
    """DeepSeek-V2's attention: keys and values in one compressed row of 64 + 32 numbers."""
    return {
        "attn_norm": (64,),
        "attn_q_a": (16, 64),
        "attn_q_a_norm": (16,),
        "attn_q_b": (4 * 64, 16),
        "attn_kv_a_mqa": (64 + 32, 64),
        "attn_kv_a_norm": (64,),
        "attn_k_b": (4, 64, 32),
        "attn_v_b": (4, 32, 64),
        "attn_output": (64, 4 * 32),
        "ffn_norm": (64,),
        "ffn_gate": (128, 64),
        "ffn_up": (128, 64),
        "ffn_down": (64, 128),
    }


def _state_space(_layer: int) -> Shapes:
    """Mamba's layer: 128 inner channels, a state of 16 numbers each."""
    return {
        "attn_norm": (64,),
        "ssm_in": (256, 64),
        "ssm_conv1d": (128, 4),
        "ssm_conv1d.bias": (128,),
        "ssm_x": (4 + 2 * 16, 128),
        "ssm_dt": (128, 4),
        "ssm_dt.bias": (128,),
        "ssm_a.": (128, 16),
        "ssm_d.": (128,),
        "ssm_out": (64, 128),
    }


def _alternating(layer: int) -> Shapes:
    """Jamba's: a state-space layer or one with attention, both with a feed-forward part."""
    if layer % 2:
        mixer: Shapes = {"attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64)}
    else:
        mixer = {name: shape for name, shape in _state_space(layer).items() if name != "attn_norm"}
        mixer = {**mixer, "ssm_dt_norm": (4,), "ssm_b_norm": (16,), "ssm_c_norm": (16,)}
    return {
        "attn_norm": (64,),
        **mixer,
        "ffn_norm": (64,),
        "ffn_gate": (128, 64),
        "ffn_up": (128, 64),
        "ffn_down": (64, 128),
    }


def _encoder(_layer: int) -> Shapes:
    """BERT's layer: everything with a bias."""
    named = {
        "attn_q": (64, 64),
        "attn_k": (64, 64),
        "attn_v": (64, 64),
        "attn_output": (64, 64),
        "attn_output_norm": (64,),
        "ffn_up": (128, 64),
        "ffn_down": (64, 128),
        "layer_output_norm": (64,),
    }
    return {**named, **{f"{name}.bias": shape[:1] for name, shape in named.items()}}


_STATE: Final = {"ssm.conv_kernel": 4, "ssm.inner_size": 128, "ssm.state_size": 16, "ssm.time_step_rank": 4}

WINDOWED: Final = Family(
    architecture="gemma3",
    layers=7,
    numbers={
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "attention.sliding_window": 512,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "feed_forward_length": 128,
    },
    tensors={"output_norm": (64,)},
    of_layer=_attention(4, 2, 32),
)
COMPRESSED: Final = Family(
    architecture="deepseek2",
    layers=2,
    numbers={
        "attention.head_count": 4,
        "attention.head_count_kv": 1,
        "attention.key_length": 96,
        "attention.value_length": 64,
        "attention.key_length_mla": 64,
        "attention.value_length_mla": 32,
        "attention.q_lora_rank": 16,
        "attention.kv_lora_rank": 64,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.dimension_count": 32,
        "rope.scaling.yarn_log_multiplier": 0.1,
        "feed_forward_length": 128,
        "leading_dense_block_count": 2,
        "expert_feed_forward_length": 32,
        "expert_shared_count": 1,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_weights_scale": 1.0,
    },
    tensors={"output_norm": (64,), "output": (_VOCABULARY_SIZE, 64)},
    of_layer=_compressed,
)
RECURRENT: Final = Family(
    architecture="mamba",
    layers=3,
    numbers={
        "attention.head_count": 0,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "feed_forward_length": 0,
        **_STATE,
    },
    tensors={"output_norm": (64,)},
    of_layer=_state_space,
)
HYBRID: Final = Family(
    architecture="jamba",
    layers=4,
    numbers={
        "attention.head_count": 2,
        "attention.head_count_kv": [0, 1, 0, 1],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "feed_forward_length": 128,
        **_STATE,
    },
    tensors={"output_norm": (64,), "output": (_VOCABULARY_SIZE, 64)},
    of_layer=_alternating,
)
ENCODER: Final = Family(
    architecture="bert",
    layers=2,
    ctx_train=512,
    numbers={
        "attention.head_count": 2,
        "attention.layer_norm_epsilon": 1e-6,
        "attention.causal": False,
        "feed_forward_length": 128,
        "pooling_type": gguf.PoolingType.MEAN.value,
    },
    tensors={
        "token_types": (2, 64),
        "position_embd": (512, 64),
        "token_embd_norm": (64,),
        "token_embd_norm.bias": (64,),
    },
    of_layer=_encoder,
)
FAMILIES: Final = (WINDOWED, COMPRESSED, RECURRENT, HYBRID, ENCODER)


def write_family(family: Family, folder: Path) -> Path:
    """Write the model into the folder as `<architecture>.gguf`; returns its path."""
    path = folder / f"{family.name}.gguf"
    writer = gguf.GGUFWriter(path, family.architecture)
    writer.add_block_count(family.layers)
    writer.add_context_length(family.ctx_train)
    writer.add_embedding_length(family.width)
    for key, value in family.numbers.items():
        _add_number(writer, f"{family.architecture}.{key}", value)
    tiny_models.add_vocabulary(writer, _VOCABULARY)
    writer.add_token_type_count(2)  # BERT only
    for name, shape in _tensors(family):
        writer.add_tensor(name, numpy.zeros(shape, dtype=numpy.float32))
    return _written(writer, path)


def _add_number(writer: gguf.GGUFWriter, key: str, value: int | float | bool | list[int] | list[bool]) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case list():
            writer.add_array(key, value)


def _tensors(family: Family) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "token_embd.weight", (_VOCABULARY_SIZE, family.width)
    for name, shape in family.tensors.items():
        yield _named(name), shape
    for layer in range(family.layers):
        for name, shape in family.of_layer(layer).items():
            yield f"blk.{layer}.{_named(name)}", shape


def _named(name: str) -> str:
    """`ssm_a.` has no suffix at all."""
    return name.rstrip(".") if "." in name else f"{name}.weight"


def write_adapter(folder: Path) -> Path:
    """A LoRA adapter for `tiny_models.TINY` that changes nothing."""
    path = folder / "adapter.gguf"
    writer = gguf.GGUFWriter(path, tiny_models.TINY.architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 8.0)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", numpy.zeros((4, 64), dtype=numpy.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", numpy.zeros((64, 4), dtype=numpy.float32))
    return _written(writer, path)


def write_projector(folder: Path) -> Path:
    """What says that it is a projector, without a working one inside."""
    path = folder / "projector.gguf"
    writer = gguf.GGUFWriter(path, "clip")
    writer.add_tensor("v.patch_embd.weight", numpy.zeros((4, 64), dtype=numpy.float32))
    return _written(writer, path)


def _written(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
