"""Models that span devices: which groups there are, what a server is started with, and what fits."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from nodeagent.config import ModelConfig, NodeConfig, parse_config
from nodeagent.devices.values import DeviceRef, joined
from nodeagent.gguf.cache_shape import CacheShape
from nodeagent.gguf.header import GgufHeader
from nodeagent.llama_server.command_line import command, describe
from nodeagent.llama_server.fit import fit_of, misfit, part_on, usable_bytes
from nodeagent.llama_server.spans import misplaced, runs_on, spans_of, unknown_groups

GIB = 2**30
FIRST = DeviceRef(device_id="gpu:0", backend="cuda", index=0, name="A", memory_total_bytes=24 * GIB)
SECOND = DeviceRef(device_id="gpu:1", backend="cuda", index=1, name="B", memory_total_bytes=8 * GIB)
BOTH = joined([FIRST, SECOND])
HEADER = GgufHeader(
    size_bytes=25 * GIB,
    layers=64,
    ctx_train=4096,
    embedding_length=8192,
    heads=64,
    cache=CacheShape(keys=(8 * 128,) * 64, values=(8 * 128,) * 64, windowed=(False,) * 64),
)


class Pins:
    """Pins by names only."""

    def child_env(self, device: DeviceRef) -> dict[str, str]:
        return {"SHOWN": ",".join(part.device_id for part in device.parts)}

    def child_args(self, device: DeviceRef) -> list[str]:
        return []


def model(**keys: Any) -> ModelConfig:
    return ModelConfig(model_id="large", path=Path("large.gguf"), gpu_layers="all", **keys)


def config_of(*devices: str) -> NodeConfig:
    text = f"node_id: box\nmodels: [{{model_id: a, path: a.gguf, devices: [{', '.join(devices)}]}}]"
    return parse_config(text, Path("node.yaml"))


def test_a_model_runs_where_its_devices_say() -> None:
    where = {True: [FIRST, SECOND], False: [BOTH]}
    for keys, on in (
        ({}, where[True]),
        ({"devices": ("gpu:1",)}, [SECOND]),
        ({"devices": ("gpu:0", "gpu:1")}, where[False]),
        ({"devices": ("gpu:1", "gpu:0")}, []),
    ):
        assert [device for device in (FIRST, SECOND, BOTH) if runs_on(model(**keys), device)] == on


def test_each_group_of_devices_is_one_more_device() -> None:
    [span] = spans_of(config_of("gpu:1", "gpu:0"), [FIRST, SECOND])
    assert (span.device_id, span.name, span.memory_total_bytes) == ("gpu:1+gpu:0", "B + A", 32 * GIB)
    assert [part.device_id for part in span.parts] == ["gpu:1", "gpu:0"]
    assert joined([FIRST, replace(SECOND, memory_total_bytes=None)]).memory_total_bytes is None


@pytest.mark.parametrize(
    ("devices", "second", "said"),
    [
        (["gpu:0", "gpu:7"], SECOND, "must be one of the node's devices (gpu:0, gpu:1), found 'gpu:7'"),
        (["gpu:0", "gpu:1"], replace(SECOND, backend="vulkan"), "can't span 'gpu:0' (cuda) and 'gpu:1' (vulkan)"),
        (["gpu:0", "gpu:1"], replace(SECOND, backend="cpu"), "a model can't span 'gpu:1': the CPUs of a host"),
        (["gpu:0", "gpu:1"], replace(SECOND, env={"A": "1"}), "their `llama_server_bin` or `env` differ"),
    ],
)
def test_devices_that_no_one_server_can_span_are_refused(devices: list[str], second: DeviceRef, said: str) -> None:
    [problem] = misplaced(config_of(*devices), [FIRST, second])
    assert problem.where == "models[0].devices[1]"
    assert said in problem.message


def test_what_can_be_spanned_is_no_problem() -> None:
    assert misplaced(config_of("gpu:0", "gpu:1"), [FIRST, SECOND, BOTH]) == []
    assert unknown_groups(config_of("gpu:0", "gpu:1"), [FIRST, SECOND, BOTH]) == []
    [problem] = unknown_groups(config_of("gpu:1", "gpu:0"), [FIRST, SECOND, BOTH])
    assert "no model spanned gpu:1, gpu:0 when the agent started" in problem.message


def test_a_server_gets_what_its_devices_need() -> None:
    keys = {"devices": ("gpu:0", "gpu:1"), "tensor_split": (3.0, 1.0), "split_mode": "row", "main_gpu": 1}
    run = command(model(**keys), BOTH, Pins(), Path("llama-server"), Path("kv"))
    assert run.env["SHOWN"] == "gpu:0,gpu:1"
    assert [run.argv[run.argv.index(flag) + 1] for flag in ("-sm", "-mg", "-ts")] == ["row", "1", "3,1"]


def test_every_server_that_would_be_run_is_described() -> None:
    lines = describe(config_of("gpu:0", "gpu:1"), [FIRST, SECOND], Pins(), Path("llama-server"))
    assert [line for line in lines.splitlines() if line.startswith("#")] == ["# a on gpu:0+gpu:1 (A + B)"]


def test_the_devices_memory_counts_together() -> None:
    assert usable_bytes(model(), BOTH) == 32 * GIB
    assert misfit(HEADER, model(), FIRST) is not None
    assert misfit(HEADER, model(), BOTH) is None
    said = misfit(replace(HEADER, size_bytes=40 * GIB), model(), BOTH)
    assert said is not None
    assert said.endswith("and the devices have together 32.0 GiB")


def test_each_device_has_to_hold_its_share() -> None:
    assert misfit(HEADER, model(tensor_split=(3.0, 1.0)), BOTH) is None
    said = misfit(HEADER, model(tensor_split=(1.0, 1.0)), BOTH)
    assert said is not None
    assert said.endswith("and split 50% : 50% its devices have too little: gpu:0 24.0 GiB, gpu:1 8.0 GiB")
    assert misfit(HEADER, model(server_args={"ts": "1/1"}), BOTH) is not None
    assert misfit(HEADER, model(split_mode="none"), BOTH) is not None
    assert usable_bytes(model(split_mode="none", main_gpu=1), BOTH) == 8 * GIB
    reserved = joined([FIRST, replace(SECOND, memory_reserve_bytes=2 * GIB)])
    assert usable_bytes(model(tensor_split=(3.0, 1.0)), reserved) == 24 * GIB
    assert usable_bytes(model(), joined([FIRST, replace(SECOND, memory_total_bytes=None)])) is None


def test_a_measurement_is_compared_with_what_the_devices_have_together() -> None:
    assert fit_of(HEADER, model(), BOTH, 30 * GIB).misfit is None
    assert fit_of(HEADER, model(), BOTH, 33 * GIB).misfit == (
        "took 33.0 GiB when it was last loaded, and the devices have together 32.0 GiB"
    )


def test_a_device_holds_its_part_of_the_model() -> None:
    assert part_on(model(tensor_split=(3.0, 1.0)), SECOND, BOTH) == 0.25
    assert part_on(model(), SECOND, BOTH) == 0.25
    assert part_on(model(), FIRST, joined([FIRST, replace(SECOND, memory_total_bytes=None)])) == 0.5
    assert part_on(model(), FIRST, None) == 1.0
