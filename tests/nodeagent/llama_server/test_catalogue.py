"""What is known of the models' files: that they can be read, and which can't fit on a device.

Only those that no setting could make fit are known not to.
"""

import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from nodeagent.config import ModelConfig
from nodeagent.devices.values import DeviceRef
from nodeagent.gguf.header import GgufHeader
from nodeagent.llama_server.catalogue import Catalogue, misfit

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


async def test_a_mount_that_hangs_is_a_problem_of_its_models_alone(caplog: pytest.LogCaptureFixture) -> None:
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
            for _ in range(4):  # nor do those that are stuck take all the threads there are
                await catalogue.inspect_all(lost)
            assert await trio.to_thread.run_sync(lambda: "free") == "free"
    finally:
        hangs.set()
    with trio.fail_after(5):
        assert await catalogue.inspect(lost[0]) is None
