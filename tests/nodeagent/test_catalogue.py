"""Which models are known not to fit on a device: only those that no setting could make fit."""

from pathlib import Path
from typing import Any

import pytest

from nodeagent.catalogue import misfit
from nodeagent.config import ModelConfig
from nodeagent.devices import DeviceRef
from nodeagent.gguf import GgufHeader

GIB = 2**30
GPU = DeviceRef(device_id="gpu:0", backend="cuda", index=0, name="GPU", memory_total_bytes=24 * GIB)
CPU = DeviceRef(device_id="cpu:0", backend="cpu", index=0, name="CPU", memory_total_bytes=24 * GIB)


def header(size_bytes: int) -> GgufHeader:
    """A model of this size; each token of context takes it 256 KiB."""
    return GgufHeader(
        path=Path("large.gguf"),
        size_bytes=size_bytes,
        architecture="llama",
        name=None,
        layers=64,
        ctx_train=262_144,
        embedding_length=8192,
        heads_kv=(8,) * 64,
        key_length=128,
        value_length=128,
        vocab_size=128_000,
        window=None,
        layers_windowed=0,
        pooling=None,
        has_chat_template=True,
    )


def model(**keys: Any) -> ModelConfig:
    return ModelConfig(model_id="large", path=Path("large.gguf"), **keys)


def test_a_model_that_is_to_be_all_on_a_gpu_and_is_larger_does_not_fit() -> None:
    assert misfit(header(40 * GIB), model(gpu_layers=99), GPU) == "needs about 41.1 GiB, and the device has 24.0 GiB"
    assert misfit(header(20 * GIB), model(gpu_layers=99), GPU) is None


@pytest.mark.parametrize("keys", [{}, {"gpu_layers": 20}])
def test_what_llama_server_itself_keeps_off_the_gpu_may_fit(keys: dict[str, Any]) -> None:
    assert misfit(header(40 * GIB), model(**keys), GPU) is None


@pytest.mark.parametrize(
    "flags",
    [
        {"cpu_moe": True},
        {"ncmoe": 30},
        {"ot": "exps=CPU"},
        {"no_kv_offload": True},
        {"cache_type_k": "q8_0"},
    ],
    ids=str,
)
def test_a_model_of_which_a_part_lies_elsewhere_or_takes_less_may_fit(flags: dict[str, Any]) -> None:
    assert misfit(header(40 * GIB), model(gpu_layers=99, server_args=flags), GPU) is None


def test_weights_that_are_mapped_may_be_larger_than_the_hosts_memory() -> None:
    assert misfit(header(40 * GIB), model(), CPU) is None


def test_a_context_that_is_larger_than_the_hosts_memory_does_not_fit() -> None:
    assert misfit(header(1 * GIB), model(ctx_size=131_072), CPU) is not None


def test_nothing_is_known_of_a_device_that_does_not_say_its_memory() -> None:
    unknown = DeviceRef(device_id="gpu:0", backend="cuda", index=0, name="GPU", memory_total_bytes=None)
    assert misfit(header(40 * GIB), model(gpu_layers=99), unknown) is None
