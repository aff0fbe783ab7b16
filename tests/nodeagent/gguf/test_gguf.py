"""Headers are read correctly, and whatever a file contains, the worst is a GgufError."""

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes import tiny_models
from nodeagent.gguf import file as gguf_file
from nodeagent.gguf.cache_shape import CacheShape
from nodeagent.gguf.header import GgufError, GgufHeader, read_header
from nodeagent.gguf.memory import Settings, estimate


def written(path: Path, fill: Callable[[gguf.GGUFWriter], None] | None = None, architecture: str = "llama") -> Path:
    """A small but complete file by the reference writer: two layers, one tensor."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_embedding_length(64)
    writer.add_head_count(4)
    if fill is not None:
        fill(writer)
    writer.add_tensor("token_embd.weight", numpy.zeros((3, 64), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reason(path: Path) -> str:
    with pytest.raises(GgufError) as caught:
        read_header(path)
    assert caught.value.path == path
    assert str(path) in str(caught.value)
    return caught.value.reason


def test_a_tiny_model_is_described_as_it_was_made(tiny_model_b: Path) -> None:
    model = tiny_models.TINY_B
    numbers = (model.heads_kv * model.width // model.heads,) * model.layers
    assert read_header(tiny_model_b) == GgufHeader(
        architecture="llama",
        size_bytes=tiny_model_b.stat().st_size,
        layers=model.layers,
        ctx_train=model.ctx_train,
        embedding_length=model.width,
        heads=model.heads,
        host_bytes=(3 + 256 + model.words) * model.width * 4,
        cache=CacheShape(keys=numbers, values=numbers, windowed=(False,) * model.layers),
    )


@pytest.mark.parametrize(
    ("architecture", "pooling", "task", "pools"),
    [
        ("llama", None, "chat", False),
        ("llama", gguf.PoolingType.NONE, "chat", False),
        ("qwen3", gguf.PoolingType.LAST, "embedding", True),
        ("bert", gguf.PoolingType.CLS, "embedding", True),
        ("bert", None, "embedding", False),
        ("bert", gguf.PoolingType.RANK, "rerank", True),
        ("qwen3", gguf.PoolingType.RANK, "rerank", True),
    ],
)
def test_what_a_model_is_for_follows_from_how_it_pools(
    architecture: str, pooling: gguf.PoolingType | None, task: str, pools: bool, tmp_path: Path
) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        if pooling is not None:
            writer.add_pooling_type(pooling)

    header = read_header(written(tmp_path / "m.gguf", fill, architecture))
    assert (header.task, header.pools) == (task, pools)


def test_the_real_chat_model_is_described(smollm2: Path) -> None:
    header = read_header(smollm2)
    assert (header.layers, header.ctx_train, header.embedding_length) == (30, 8192, 576)
    assert header.cache is not None
    assert header.cache.keys == header.cache.values == (3 * 64,) * 30


def test_lengths_of_keys_and_values_in_the_file_take_precedence(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        writer.add_key_length(192)
        writer.add_value_length(128)

    header = read_header(written(tmp_path / "model.gguf", fill))
    assert header.cache is not None
    assert (header.cache.keys, header.cache.values) == ((4 * 192,) * 2, (4 * 128,) * 2)


def test_every_kind_of_value_is_skipped(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter) -> None:
        for kind in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "uint64", "int64", "float64"):
            getattr(writer, f"add_{kind}")(f"test.{kind}", 7)
            values = [0.5, 1.5] if kind.startswith("float") else [1, 2]
            numbers = gguf.GGUFValueType[kind.upper()]
            writer.add_key_value(f"test.{kind}s", values, gguf.GGUFValueType.ARRAY, sub_type=numbers)
        writer.add_bool("test.bool", True)
        writer.add_array("test.bools", [True, False])
        writer.add_string("test.text", "größer")
        writer.add_array("test.texts", ["a", "", "größer" * 100])
        writer.add_array("test.long", list(range(10_000)))
        writer.add_key_length(99)

    header = read_header(written(tmp_path / "model.gguf", fill))
    assert header.cache is not None
    assert header.cache.keys == (4 * 99,) * 2


def test_rows_that_are_looked_up_by_token_stay_on_the_host_unless_they_are_the_output_head_too(tmp_path: Path) -> None:
    def fill(writer: gguf.GGUFWriter, *names: str) -> None:
        for name in names:
            writer.add_tensor(name, numpy.zeros((2, 64), dtype=numpy.float32))

    size = 3 * 64 * 4  # of token_embd.weight
    tied = read_header(written(tmp_path / "tied.gguf"))
    untied = read_header(written(tmp_path / "untied.gguf", lambda writer: fill(writer, "output.weight")))
    by_layer = read_header(written(tmp_path / "layer.gguf", lambda writer: fill(writer, "per_layer_token_embd.weight")))
    assert (tied.host_bytes, untied.host_bytes, by_layer.host_bytes) == (0, size, 2 * 64 * 4)


def test_block_sizes_are_those_of_the_reference() -> None:
    for number, size in gguf_file._BLOCKS.items():
        assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == size


def split(folder: Path) -> Path:
    """A model in three parts, as gguf-split writes them too; the first one's path."""
    writer = gguf.GGUFWriter(folder / "big.gguf", "llama", split_max_tensors=1)
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_embedding_length(64)
    for number in range(3):
        writer.add_tensor(f"blk.{number}.attn_q.weight", numpy.zeros((64, 64), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "big-00001-of-00003.gguf"


def test_the_sizes_of_the_parts_of_a_split_model_are_added(tmp_path: Path) -> None:
    first = split(tmp_path)
    assert read_header(first).size_bytes == sum(part.stat().st_size for part in tmp_path.iterdir())


def test_a_missing_part_of_a_split_model_is_named(tmp_path: Path) -> None:
    first = split(tmp_path)
    missing = tmp_path / "big-00002-of-00003.gguf"
    missing.unlink()
    with pytest.raises(GgufError) as caught:
        read_header(first)
    assert (caught.value.path, caught.value.reason) == (missing, "no such file")


def test_a_truncated_part_of_a_split_model_is_named(tmp_path: Path) -> None:
    first = split(tmp_path)
    last = tmp_path / "big-00003-of-00003.gguf"
    os.truncate(last, last.stat().st_size - 100)
    with pytest.raises(GgufError, match="truncated") as caught:
        read_header(first)
    assert caught.value.path == last


def test_a_split_model_is_configured_by_its_first_part(tmp_path: Path) -> None:
    first = split(tmp_path)
    assert reason(tmp_path / "big-00002-of-00003.gguf") == "part 2 of 3: configure the first part"
    renamed = first.rename(tmp_path / "other.gguf")
    assert reason(renamed) == "the first of 3 parts: its name must end with -00001-of-00003.gguf"


def test_what_is_no_regular_file_is_refused_with_the_reason(tmp_path: Path) -> None:
    assert reason(tmp_path / "absent.gguf") == "no such file"
    assert reason(tmp_path) == "not a regular file"
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    assert reason(pipe) == "not a regular file"
    loop = tmp_path / "loop.gguf"
    loop.symlink_to(loop)
    assert "symbolic links" in reason(loop)
    assert "can't be read" in reason(tmp_path / "nul\0.gguf")


def test_a_file_of_another_format_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for content, said in (
        (b"", "empty"),
        (b"GG", "not a GGUF file"),
        (b"<!doctype html><html>", "not a GGUF file"),
        (b"GGUF" + struct.pack("<I", 1), "GGUF version 1 is not supported"),
        (b"GGUF" + struct.pack(">I", 3), "a big-endian GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0), "has no architecture: not a model"),
    ):
        path.write_bytes(content)
        assert reason(path) == said


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param(struct.pack("<QQ", 1 << 63, 0), id="tensors"),
        pytest.param(struct.pack("<QQ", 0, 1 << 63), id="keys"),
        pytest.param(struct.pack("<QQQ", 0, 1, 1 << 40) + bytes(64), id="length of a key"),
        pytest.param(struct.pack("<QQQ1sIQ", 0, 1, 1, b"k", 8, 1 << 63) + bytes(64), id="length of a text"),
        pytest.param(struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 4, 1 << 62) + bytes(64), id="length of an array"),
        pytest.param(struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 8, 1 << 61) + bytes(64), id="length of texts"),
        pytest.param(struct.pack("<QQQ1sIIQ", 0, 1, 1, b"k", 9, 9, 1) + bytes(64), id="array in an array"),
        pytest.param(struct.pack("<QQQ1sI", 0, 1, 1, b"k", 13) + bytes(64), id="type of a value"),
        pytest.param(struct.pack("<QQQ1sI", 1, 0, 1, b"t", 1 << 31) + bytes(64), id="dimensions"),
    ],
)
def test_impossible_counts_and_lengths_are_refused_at_once(tmp_path: Path, rest: bytes) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<I", 3) + rest)
    assert reason(path).startswith(("truncated", "damaged"))


def test_a_huge_sparse_file_is_not_read_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"k", 8, 1 << 34))
    os.truncate(path, 1 << 36)
    assert reason(path).startswith("damaged")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.block_count", 0),
        ("llama.block_count", 1 << 30),
        ("llama.context_length", 0),
        ("general.alignment", 3),
        ("general.alignment", 0),
    ],
)
def test_impossible_numbers_are_refused(tmp_path: Path, key: str, value: int) -> None:
    # The writer would use it as its alignment: a key of the same length stands for it until the file is written.
    path = written(tmp_path / "model.gguf", lambda writer: writer.add_uint32("x" * len(key), value))
    assert read_header(path).layers == 2
    path.write_bytes(path.read_bytes().replace(b"x" * len(key), key.encode()))
    assert reason(path).startswith("damaged")


def test_values_of_the_wrong_type_are_refused(tmp_path: Path) -> None:
    for key in ("llama.block_count", "llama.attention.head_count", "llama.attention.sliding_window"):
        path = written(tmp_path / "model.gguf", lambda writer, key=key: writer.add_string(key, "many"))  # type: ignore[misc]
        assert reason(path) == f"damaged: invalid value of {key}"


def test_a_list_that_has_too_few_numbers_for_the_layers_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", lambda writer: writer.add_head_count_kv([2]))
    assert reason(path) == "damaged: invalid value of llama.attention.head_count_kv"


def test_a_header_that_is_longer_than_any_real_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 1 << 30))
    os.truncate(path, 1 << 36)
    assert reason(path) == "damaged: a header of over 128 MiB"


def test_a_missing_key_that_llama_cpp_needs_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf", architecture="llama")
    path.write_bytes(path.read_bytes().replace(b"llama.block_count", b"llama.block_c0unt"))
    assert reason(path) == "has no llama.block_count: not a model that llama.cpp can load"


def test_a_file_with_tensors_of_an_unknown_type_is_accepted(tmp_path: Path) -> None:
    path = written(tmp_path / "model.gguf")
    content = path.read_bytes()
    name = b"token_embd.weight"
    kind_at = content.index(name) + len(name) + 4 + 2 * 8
    assert content[kind_at : kind_at + 4] == struct.pack("<I", 0)
    path.write_bytes(content[:kind_at] + struct.pack("<I", 99) + content[kind_at + 4 :])
    assert read_header(path).layers == 2


def test_a_file_without_read_permission_is_refused_with_the_reason(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "closed.gguf"
    shutil.copy(tiny_model, path)
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything
        assert read_header(path).layers == tiny_models.TINY.layers
    else:
        assert reason(path) == "permission denied"


# The fixtures live for the whole session and are only read; each example writes its own file.
many = settings(
    max_examples=3 * settings().max_examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@many
@given(st.data())
def test_a_file_that_was_cut_anywhere_is_reported_as_truncated(
    tiny_model: Path, tmp_path: Path, data: st.DataObject
) -> None:
    whole = tiny_model.read_bytes()
    tensors_at = whole.rindex(b"blk.1.ffn_down.weight")
    # The header is a fiftieth of the file, and has most of what can go wrong.
    length = data.draw(st.integers(0, tensors_at + 64) | st.integers(0, len(whole) - 1))
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:length])
    assert reason(path).startswith("truncated" if length >= 4 else ("not a GGUF", "empty"))


@many
@given(st.data())
def test_a_damaged_header_gives_a_header_or_a_gguf_error(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "model.gguf"
    if not path.exists():
        written(path)
    content = bytearray(path.read_bytes())
    end = content.index(b"token_embd.weight") + 64
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, end))
        patch = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, bytes(8)]))
        content[at : at + len(patch)] = patch
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(content)
    try:
        header = read_header(damaged)
    except GgufError:
        return
    for asked in (Settings(ctx_size=4096), Settings()):
        needed = estimate(header, asked)
        assert needed is None or needed.total > 0
