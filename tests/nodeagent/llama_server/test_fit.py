"""Which models can't fit on a device: only those which no setting of llama-server that is left to it could make fit."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.config import ModelConfig, parse_config
from nodeagent.devices.values import DeviceRef
from nodeagent.gguf.cache_shape import CacheShape
from nodeagent.gguf.header import GgufHeader
from nodeagent.gguf.memory import Settings
from nodeagent.llama_server.fit import Fit, bytes_on_device, fit_of, gpu_layers, memory_on_device, misfit, settings

GIB = 2**30
GPU = DeviceRef(device_id="gpu:0", backend="cuda", index=0, name="GPU", memory_total_bytes=24 * GIB)
CPU = DeviceRef(device_id="cpu:0", backend="cpu", index=0, name="CPU", memory_total_bytes=24 * GIB)


def header(size_bytes: int) -> GgufHeader:
    """A model of this size; each token of context takes it 256 KiB."""
    return GgufHeader(
        size_bytes=size_bytes,
        layers=64,
        ctx_train=262_144,
        embedding_length=8192,
        heads=64,
        cache=CacheShape(keys=(8 * 128,) * 64, values=(8 * 128,) * 64, windowed=(False,) * 64),
    )


def model(**keys: Any) -> ModelConfig:
    return ModelConfig(model_id="large", path=Path("large.gguf"), **keys)


def test_a_model_that_is_larger_than_the_gpu_it_is_configured_for_does_not_fit_and_the_reason_has_the_figures() -> None:
    assert misfit(header(40 * GIB), model(gpu_layers=99), GPU) == (
        "needs about 41.1 GiB (40.0 GiB of weights + 1.0 GiB of KV cache + 132 MiB of compute buffer), "
        "and the device has 24.0 GiB"
    )
    assert misfit(header(40 * GIB), model(gpu_layers="all"), GPU) is not None
    assert misfit(header(40 * GIB), model(server_args={"ngl": "all"}), GPU) is not None
    assert misfit(header(40 * GIB), model(server_args={"n_gpu_layers": 99}), GPU) is not None
    assert misfit(header(20 * GIB), model(gpu_layers=99), GPU) is None


@pytest.mark.parametrize("keys", [{}, {"gpu_layers": 20}, {"gpu_layers": "auto"}, {"gpu_layers": -1}])
def test_a_model_of_which_llama_server_decides_the_gpu_layers_may_fit(keys: dict[str, Any]) -> None:
    assert misfit(header(40 * GIB), model(**keys), GPU) is None


@pytest.mark.parametrize("flags", [{"cpu_moe": True}, {"ncmoe": 30}, {"ot": "exps=CPU"}], ids=str)
def test_a_model_whose_weights_are_partly_elsewhere_may_fit_but_its_cache_counts(flags: dict[str, Any]) -> None:
    keys = {"gpu_layers": 99, "server_args": flags}
    assert misfit(header(40 * GIB), model(**keys), GPU) is None
    assert misfit(header(40 * GIB), model(ctx_size=131_072, **keys), GPU) is not None


def test_an_unknown_architecture_gets_no_verdict() -> None:
    unknown = replace(header(40 * GIB), cache=None)
    assert misfit(unknown, model(gpu_layers=99), GPU) is None
    assert bytes_on_device(unknown, model(), GPU) == 40 * GIB
    assert bytes_on_device(unknown, model(), CPU) == 0


def test_mapped_weights_may_be_larger_than_the_hosts_memory() -> None:
    assert misfit(header(40 * GIB), model(), CPU) is None
    assert misfit(header(40 * GIB), model(server_args={"load_mode": "mmap"}), CPU) is None


@pytest.mark.parametrize("flags", [{"mlock": True}, {"no_mmap": True}, {"load_mode": "none"}], ids=str)
def test_weights_that_are_held_in_memory_count(flags: dict[str, Any]) -> None:
    assert misfit(header(40 * GIB), model(server_args=flags), CPU) is not None


def test_a_context_that_is_larger_than_the_hosts_memory_does_not_fit() -> None:
    assert misfit(header(1 * GIB), model(ctx_size=131_072), CPU) == (
        "needs about 32.2 GiB (32.0 GiB of KV cache + 256 MiB of compute buffer), and the device has 24.0 GiB"
    )
    smaller = {"cache_type_k": "q8_0", "ctv": "q8_0"}
    assert misfit(header(1 * GIB), model(ctx_size=131_072, server_args=smaller), CPU) is None


def test_any_model_may_fit_on_a_device_whose_memory_is_unknown() -> None:
    unknown = DeviceRef(device_id="gpu:0", backend="cuda", index=0, name="GPU", memory_total_bytes=None)
    assert misfit(header(40 * GIB), model(gpu_layers=99), unknown) is None


def test_a_measurement_beats_the_estimate_and_must_fit_beside_the_reserve() -> None:
    assert fit_of(header(40 * GIB), model(gpu_layers=99), GPU, None).misfit is not None
    assert fit_of(header(40 * GIB), model(gpu_layers=99), GPU, 23 * GIB) == Fit(23 * GIB, None, measured=True)
    reserving = replace(GPU, memory_reserve_bytes=2 * GIB)
    assert fit_of(header(1 * GIB), model(), reserving, 23 * GIB).misfit == (
        "took 23.0 GiB when it was last loaded, and the device has 24.0 GiB, of which 2.0 GiB are reserved for others"
    )


def test_the_part_of_a_model_that_stays_off_the_gpu_does_not_count_there() -> None:
    whole = memory_on_device(header(40 * GIB), model(), GPU)
    half = memory_on_device(header(40 * GIB), model(gpu_layers=32), GPU)
    assert whole is not None
    assert half == replace(whole, weights=20 * GIB, cache=whole.cache // 2)
    rows = memory_on_device(replace(header(40 * GIB), host_bytes=GIB), model(), GPU)
    assert rows == replace(whole, weights=39 * GIB)
    off = memory_on_device(header(40 * GIB), model(server_args={"nkvo": True}), GPU)
    assert off == replace(whole, cache=0)


@pytest.mark.parametrize(
    ("keys", "meant"),
    [
        ({}, Settings()),
        ({"ctx_size": 8192, "parallel": 4}, Settings(ctx_size=8192, parallel=4)),
        ({"server_args": {"c": 8192, "kvu": True}}, Settings(ctx_size=8192, unified=True)),
        ({"server_args": {"no-kv-unified": True}}, Settings()),
        ({"server_args": {"fit": "off"}}, Settings(ctx_size=0)),
        ({"server_args": {"fitc": "8192"}}, Settings(least_ctx=8192)),
        ({"batch_size": 256, "ubatch_size": 128}, Settings(batch_size=256, ubatch_size=128)),
        ({"server_args": {"b": 256, "ub": "128"}}, Settings(batch_size=256, ubatch_size=128)),
        ({"server_args": {"ctk": "q8_0", "cache_type_v": "q4_0"}}, Settings(cache_k="q8_0", cache_v="q4_0")),
        ({"server_args": {"swa_full": True}}, Settings(swa_full=True)),
        ({"server_args": {"swa_full": False}}, Settings()),
        ({"flash_attn": "off"}, Settings(flash_attn=False)),
        ({"flash_attn": "auto"}, Settings()),
        ({"server_args": {"fa": "off"}}, Settings(flash_attn=False)),
        ({"server_args": {"ub": ["64", "128"]}}, Settings(ubatch_size=128)),
        ({"server_args": {"ub": "many"}}, Settings()),
    ],
    ids=str,
)
def test_the_settings_are_those_of_the_keys_and_of_the_flags(keys: dict[str, Any], meant: Settings) -> None:
    assert settings(ModelConfig.model_validate({"model_id": "m", "path": "/m.gguf", **keys})) == meant


@pytest.mark.parametrize(("value", "count"), [("all", 2**31 - 1), ("auto", None), ("-1", None), ("7", 7)])
def test_the_number_of_layers_asked_for_is_known_unless_the_server_decides(value: str, count: int | None) -> None:
    text = f"models: [{{model_id: a, path: a, gpu_layers: {value}}}]"
    assert gpu_layers(parse_config(text, Path("/etc/node/node.yaml")).models[0]) == count
