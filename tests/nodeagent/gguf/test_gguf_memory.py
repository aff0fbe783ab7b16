"""The memory of models of every family, as worked out by hand from llama.cpp's code and from its logs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest

from nodeagent.gguf.header import GgufHeader, read_header
from nodeagent.gguf.memory import Settings, estimate

MIB = 2**20


def shaped(path: Path, architecture: str, layers: int, width: int, **numbers: Any) -> GgufHeader:
    """The header of a file of that shape; a key's dots are written as `__`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers)
    writer.add_context_length(131_072)
    writer.add_embedding_length(width)
    for key, value in numbers.items():
        add: Callable[[str, Any], None] = writer.add_array if isinstance(value, list) else writer.add_uint32
        add(f"{architecture}.{key.replace('__', '.')}", value)
    writer.add_tensor("token_embd.weight", numpy.zeros((3, 64), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return read_header(path)


def cache_mib(header: GgufHeader, **settings: Any) -> float:
    needed = estimate(header, Settings(**settings))
    assert needed is not None
    return needed.cache / MIB


@pytest.fixture
def plain(tmp_path: Path) -> GgufHeader:
    """SmolLM2-135M's shape: a token takes 30 layers x 3 heads x 64 numbers x 2 x 2 bytes = 22.5 KiB."""
    return shaped(tmp_path / "plain.gguf", "llama", 30, 576, attention__head_count=9, attention__head_count_kv=3)


def test_the_context_is_padded_and_divided_among_the_slots(plain: GgufHeader) -> None:
    # The server's own figures (build b10068): -c 8192 -np 4: 180 MiB, with q8_0 for both 95.6.
    assert cache_mib(plain, ctx_size=8192, parallel=4) == 180.0
    assert cache_mib(plain, ctx_size=8192, parallel=4, cache_k="q8_0", cache_v="q8_0") == 95.625
    token_mib = 22.5 / 1024
    assert cache_mib(plain, ctx_size=1000) == 1024 * token_mib
    # Three slots of 8192 / 3 = 2730 tokens, each padded to 2816; one cache for all of them has no more than asked for.
    assert cache_mib(plain, ctx_size=8192, parallel=3) == 3 * 2816 * token_mib
    assert cache_mib(plain, ctx_size=8192, parallel=3, unified=True) == 180.0


def test_without_a_context_the_least_one_counts_and_0_is_the_models_own(plain: GgufHeader) -> None:
    assert cache_mib(plain) == cache_mib(plain, ctx_size=4096)
    assert cache_mib(plain, least_ctx=1024) == cache_mib(plain, ctx_size=1024)
    assert cache_mib(plain, ctx_size=0) == cache_mib(plain, ctx_size=131_072)


def test_the_types_of_keys_and_values_count_each_for_itself(plain: GgufHeader) -> None:
    assert cache_mib(plain, ctx_size=8192, cache_k="f32") == 270.0
    assert cache_mib(plain, ctx_size=8192, cache_k="q8_0") == 90.0 + 95.625 / 2
    assert estimate(plain, Settings(cache_v="q9_9")) is None


def test_windowed_layers_keep_the_window_and_one_batch_for_each_slot(tmp_path: Path) -> None:
    gemma = shaped(
        tmp_path / "gemma.gguf",
        "gemma3",
        48,
        3840,
        attention__head_count=16,
        attention__head_count_kv=8,
        attention__key_length=256,
        attention__value_length=256,
        attention__sliding_window=1024,
    )
    # Gemma3-12B's shape with four slots: 8 layers of 32768 tokens, 40 layers of 4 x (1024 + 512).
    assert cache_mib(gemma, ctx_size=32_768, parallel=4) == 3968.0
    # In one cache for all slots: 8 layers as before, 40 of 4 x 1024 + 512 tokens.
    assert cache_mib(gemma, ctx_size=32_768, parallel=4, unified=True) == 2048 + 40 * (4 * 1024 + 512) * 8 / 1024
    assert cache_mib(gemma, ctx_size=32_768, parallel=4, swa_full=True) == 48 * 32_768 * 8 / 1024
    # A context that is smaller than the window.
    assert cache_mib(gemma, ctx_size=512) == 48 * 512 * 8 / 1024
    # A larger batch needs more cells.
    larger = cache_mib(gemma, ctx_size=32_768, ubatch_size=2048) - cache_mib(gemma, ctx_size=32_768)
    assert larger == 40 * 1536 * 8 / 1024


@pytest.mark.parametrize(
    ("architecture", "pattern", "windowed"),
    [
        ("gemma3", None, [True] * 5 + [False] + [True] * 5 + [False]),
        ("gemma3", [True, True, False] * 4, [True, True, False] * 4),
        ("gemma3", 4, [True, True, True, False] * 3),
        ("gemma3", 0, [True] * 12),
        ("gpt-oss", None, [True, False] * 6),
        ("smallthinker", None, [False, True, True, True] * 3),
        ("phi3", None, [False] * 12),
    ],
    ids=["architecture", "flags", "period", "all", "gpt-oss", "first", "phi3"],
)
def test_which_layers_have_a_window_is_said_by_the_file_else_by_the_architecture(
    tmp_path: Path, architecture: str, pattern: list[bool] | int | None, windowed: list[bool]
) -> None:
    more = {} if pattern is None else {"attention__sliding_window_pattern": pattern}
    path = tmp_path / "model.gguf"
    header = shaped(path, architecture, 12, 64, attention__head_count=4, attention__sliding_window=512, **more)
    assert header.cache is not None
    assert list(header.cache.windowed) == windowed


def test_an_architecture_with_windows_has_none_if_the_file_names_no_window(tmp_path: Path) -> None:
    header = shaped(tmp_path / "model.gguf", "olmo2", 4, 64, attention__head_count=4)
    assert header.cache is not None
    assert not any(header.cache.windowed)


def test_windowed_layers_may_have_heads_of_another_length_and_share_a_cache(tmp_path: Path) -> None:
    header = shaped(
        tmp_path / "model.gguf",
        "gemma4",
        6,
        64,
        attention__head_count=4,
        attention__head_count_kv=[2, 2, 2, 1, 2, 1],
        attention__key_length=64,
        attention__value_length=64,
        attention__key_length_swa=32,
        attention__value_length_swa=16,
        attention__sliding_window=512,
        attention__sliding_window_pattern=[True, True, True, False, True, False],
        attention__shared_kv_layers=2,
    )
    assert header.cache is not None
    assert header.cache.keys == (64, 64, 64, 64, 0, 0)
    assert header.cache.values == (32, 32, 32, 64, 0, 0)


def test_a_compressed_cache_has_one_row_for_keys_and_values(tmp_path: Path) -> None:
    shape = {
        "attention__head_count": 16,
        "attention__head_count_kv": 1,
        "attention__key_length": 576,
        "attention__value_length": 512,
        "attention__kv_lora_rank": 512,
        "rope__dimension_count": 64,
    }
    lengths = {"attention__key_length_mla": 192, "attention__value_length_mla": 128}
    lite = shaped(tmp_path / "lite.gguf", "deepseek2", 27, 2048, **shape, **lengths)
    assert cache_mib(lite, ctx_size=32_768) == 972.0
    older = shaped(tmp_path / "older.gguf", "deepseek2", 27, 2048, **shape)
    assert cache_mib(older, ctx_size=32_768) == 27 * 32_768 * (576 + 512) * 2 / MIB


def test_recurrent_states_count_for_each_slot_and_not_for_each_token(tmp_path: Path) -> None:
    mamba = shaped(
        tmp_path / "mamba.gguf", "mamba2", 64, 2560, ssm__conv_kernel=4, ssm__inner_size=5120, ssm__state_size=128,
        ssm__group_count=1,
    )  # fmt: skip
    state_mib = 64 * (3 * (5120 + 2 * 128) + 128 * 5120) * 4 / MIB
    assert cache_mib(mamba, ctx_size=4096, parallel=3) == 3 * state_mib
    assert cache_mib(mamba, ctx_size=131_072, parallel=3) == 3 * state_mib
    rwkv = shaped(tmp_path / "rwkv.gguf", "rwkv7", 12, 768, wkv__head_size=64, token_shift_count=2)
    assert cache_mib(rwkv, parallel=2) == 2 * 12 * (2 * 768 + 64 * 768) * 4 / MIB


def test_layers_of_a_hybrid_have_a_cache_or_a_state(tmp_path: Path) -> None:
    state = {"ssm__conv_kernel": 4, "ssm__inner_size": 128, "ssm__state_size": 16}
    jamba = shaped(
        tmp_path / "jamba.gguf", "jamba", 4, 64, attention__head_count=4, attention__head_count_kv=[0, 2, 0, 0], **state
    )
    assert jamba.cache is not None
    assert (jamba.cache.keys, jamba.cache.state) == ((0, 32, 0, 0), 3 * (3 * 128 + 16 * 128))
    qwen = shaped(
        tmp_path / "qwen.gguf",
        "qwen3next",
        8,
        64,
        attention__head_count=4,
        attention__head_count_kv=2,
        full_attention_interval=4,
        **state,
    )
    assert qwen.cache is not None
    assert (qwen.cache.keys, qwen.cache.state) == ((0, 0, 0, 32) * 2, 6 * (3 * 128 + 16 * 128))
    nemotron = shaped(
        tmp_path / "nemotron.gguf", "nemotron_h", 3, 64, attention__head_count=4, attention__head_count_kv=[0, 2, 0],
        feed_forward_length=[0, 0, 128], **state,
    )  # fmt: skip
    assert nemotron.cache is not None
    assert nemotron.cache.state == 3 * 128 + 16 * 128, "a layer that only feeds forward keeps nothing"
    falcon = shaped(
        tmp_path / "falcon.gguf", "falcon-h1", 2, 64, attention__head_count=4, attention__head_count_kv=2, **state
    )
    assert falcon.cache is not None
    assert (falcon.cache.keys, falcon.cache.state) == ((32, 32), 2 * (3 * 128 + 16 * 128))
    lfm = shaped(
        tmp_path / "lfm.gguf",
        "lfm2",
        2,
        64,
        attention__head_count=4,
        attention__head_count_kv=[0, 2],
        shortconv__l_cache=3,
    )
    assert lfm.cache is not None
    assert lfm.cache.state == 2 * 64


def test_layers_that_predict_further_tokens_have_no_cache(tmp_path: Path) -> None:
    header = shaped(tmp_path / "model.gguf", "glm4moe", 3, 64, attention__head_count=4, nextn_predict_layers=1)
    assert header.cache is not None
    assert header.cache.keys == (64, 64, 0)


def test_encoders_have_no_cache(tmp_path: Path) -> None:
    header = shaped(tmp_path / "model.gguf", "bert", 12, 384, attention__head_count=12)
    assert cache_mib(header, ctx_size=512) == 0


def test_of_an_unknown_architecture_nothing_is_claimed(tmp_path: Path) -> None:
    header = shaped(tmp_path / "model.gguf", "tomorrow5", 2, 64, attention__head_count=4)
    assert header.cache is None
    assert estimate(header, Settings(ctx_size=1 << 30)) is None


def test_the_compute_buffer_grows_with_the_batch_and_the_context_and_without_flash_attention(
    plain: GgufHeader,
) -> None:
    def compute(**settings: Any) -> int:
        needed = estimate(plain, Settings(ctx_size=8192, **settings))
        assert needed is not None
        return needed.compute

    row = 8 * 4 * 576
    assert compute() == 512 * (2 * 8192 + row)
    assert compute(parallel=4) == 512 * (2 * 2048 + row)
    assert compute(ubatch_size=128) == compute(batch_size=128) == 128 * (2 * 8192 + row)
    assert compute(flash_attn=False) == compute() + 512 * 4 * 9 * 8192
