"""What is known of the model files: whether they can be read, and which models can't fit on a device.

A model is known not to fit only if no setting of llama-server could make it fit.
"""

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio

from nodeagent.config import ModelConfig
from nodeagent.devices.values import DeviceRef
from nodeagent.gguf.header import GgufError, GgufHeader
from nodeagent.llama_server.catalogue import Catalogue, bytes_on_device, misfit

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
        heads_kv=(8,) * 64,
        key_length=128,
        value_length=128,
        window=None,
        layers_windowed=0,
    )


def model(**keys: Any) -> ModelConfig:
    return ModelConfig(model_id="large", path=Path("large.gguf"), **keys)


def test_a_model_that_is_larger_than_the_gpu_it_is_configured_for_does_not_fit() -> None:
    assert misfit(header(40 * GIB), model(gpu_layers=99), GPU) == "needs about 41.1 GiB, and the device has 24.0 GiB"
    assert misfit(header(40 * GIB), model(gpu_layers="all"), GPU) is not None
    assert misfit(header(20 * GIB), model(gpu_layers=99), GPU) is None


@pytest.mark.parametrize("keys", [{}, {"gpu_layers": 20}, {"gpu_layers": "auto"}, {"gpu_layers": -1}])
def test_a_model_of_which_llama_server_decides_the_gpu_layers_may_fit(keys: dict[str, Any]) -> None:
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
def test_a_model_with_flags_that_reduce_its_memory_on_the_device_may_fit(flags: dict[str, Any]) -> None:
    assert misfit(header(40 * GIB), model(gpu_layers=99, server_args=flags), GPU) is None


def test_mapped_weights_may_be_larger_than_the_hosts_memory() -> None:
    assert misfit(header(40 * GIB), model(), CPU) is None


def test_a_context_that_is_larger_than_the_hosts_memory_does_not_fit() -> None:
    assert misfit(header(1 * GIB), model(ctx_size=131_072), CPU) is not None


def test_any_model_may_fit_on_a_device_whose_memory_is_unknown() -> None:
    unknown = DeviceRef(device_id="gpu:0", backend="cuda", index=0, name="GPU", memory_total_bytes=None)
    assert misfit(header(40 * GIB), model(gpu_layers=99), unknown) is None


def test_slots_and_batch_size_are_part_of_the_estimate() -> None:
    windowed = replace(header(1 * GIB), window=1024, layers_windowed=64)
    one = bytes_on_device(windowed, model(ctx_size=32_768), GPU)
    assert bytes_on_device(windowed, model(ctx_size=32_768, parallel=2), GPU) > one
    assert bytes_on_device(windowed, model(ctx_size=32_768, ubatch_size=2048), GPU) > one
    assert bytes_on_device(windowed, model(ctx_size=32_768), CPU) == one - 1 * GIB


async def test_a_problem_is_logged_once_and_gone_when_the_file_is_repaired(caplog: pytest.LogCaptureFixture) -> None:
    broken: set[str] = set()

    def read(path: Path) -> GgufHeader:
        if path.name in broken:
            raise GgufError(path, "truncated")
        return header(1 * GIB)

    catalogue = Catalogue(read=read)
    with trio.fail_after(5):
        assert (catalogue.header("large"), catalogue.problem("large")) == (None, None)
        broken.add("large.gguf")
        await catalogue.inspect_all([model()])
        assert (catalogue.header("large"), catalogue.problem("large")) == (None, "large.gguf: truncated")
        assert caplog.messages == [
            "model large can't be loaded: large.gguf: truncated; the file is checked again with each load"
        ]
        broken.clear()
        assert await catalogue.inspect(model()) is None
        assert (catalogue.header("large"), catalogue.problem("large")) == (header(1 * GIB), None)
        broken.add("large.gguf")
        assert await catalogue.inspect(model()) == "large.gguf: truncated"
        assert catalogue.header("large") == header(1 * GIB), "as it was last read"


async def test_a_missing_file_is_a_problem(tmp_path: Path) -> None:
    with trio.fail_after(5):
        problem = await Catalogue().inspect(ModelConfig(model_id="m", path=tmp_path / "m.gguf"))
    assert problem == f"{tmp_path / 'm.gguf'}: no such file"


async def test_a_mount_that_hangs_affects_only_its_own_models(caplog: pytest.LogCaptureFixture) -> None:
    hangs = threading.Event()

    def read(path: Path) -> GgufHeader:
        if path.is_relative_to("/mnt"):
            hangs.wait()
        return header(1 * GIB)

    catalogue = Catalogue(read=read, patience_s=0.2)
    lost = [ModelConfig(model_id=f"lost-{number}", path=Path(f"/mnt/{number}.gguf")) for number in range(12)]
    try:
        with trio.fail_after(5):
            began = trio.current_time()
            await catalogue.inspect_all([model(), *lost])
            assert trio.current_time() - began < 2  # not one after the other
            assert catalogue.problem("large") is None
            assert catalogue.problem("lost-11") == "/mnt/11.gguf: could not be read within 0.2 s"
            assert caplog.text.count("could not be read within") == 12
            for _ in range(4):  # and those that hang do not use up all threads
                await catalogue.inspect_all(lost)
            assert await trio.to_thread.run_sync(lambda: "free") == "free"
    finally:
        hangs.set()
    with trio.fail_after(5):
        assert await catalogue.inspect(lost[0]) is None
