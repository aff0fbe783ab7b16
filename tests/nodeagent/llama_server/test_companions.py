"""How the files beside a model reach the server, and how the memory for others is kept free."""

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from fakes import tiny_families
from nodeagent.config import Dialect, ModelConfig, parse_config, parse_dialect
from nodeagent.devices.values import DeviceRef
from nodeagent.llama_server.catalogue import Catalogue
from nodeagent.llama_server.command_line import command, model_arguments
from nodeagent.llama_server.fit import memory_on_device, misfit, with_reserve

GIB = 2**30
CPU = DeviceRef(device_id="cpu:0", backend="cpu", index=0, name="CPU", memory_total_bytes=GIB)
GPU = DeviceRef(device_id="gpu:0", backend="cuda", index=0, name="GPU", memory_total_bytes=GIB)
OLD = Dialect(has_spec_type=False, has_fit_target=False, scales_by_colon=False)


class NoPins:
    def child_env(self, _device: DeviceRef) -> dict[str, str]:
        return {}

    def child_args(self, _device: DeviceRef) -> list[str]:
        return []


def model(**keys: Any) -> ModelConfig:
    return ModelConfig.model_validate({"model_id": "m", "path": "/m/m.gguf", **keys}, context=Path("/m"))


def argv(one: ModelConfig, device: DeviceRef = CPU, dialect: Dialect = Dialect()) -> str:  # noqa: B008
    run = command(one, device, NoPins(), Path("/bin/llama-server"), Path("/kv"), lambda _binary: dialect)
    return " ".join(run.argv)


def test_each_file_becomes_its_flag() -> None:
    assert " --mmproj /m/eyes.gguf" in argv(model(mmproj="eyes.gguf"))
    assert " -md /m/small.gguf --spec-type draft-simple" in argv(model(draft_model="small.gguf"))
    loras = ["one.gguf", {"path": "two.gguf", "scale": 0.5}]
    assert " --lora /m/one.gguf --lora-scaled /m/two.gguf:0.5" in argv(model(loras=loras))
    assert "--lora /m/one.gguf" in " ".join(model_arguments(model(loras=loras)))


def test_an_older_build_gets_the_flags_that_it_has() -> None:
    assert "--spec-type" not in argv(model(draft_model="small.gguf"), dialect=OLD)
    scaled = model(loras=[{"path": "two.gguf", "scale": 0.5}])
    assert " --lora-scaled /m/two.gguf 0.5" in argv(scaled, dialect=OLD)


def test_the_kind_of_drafting_may_be_given() -> None:
    said = argv(model(draft_model="small.gguf", server_args={"spec_type": "draft-eagle3"}))
    assert said.count("--spec-type") == 1
    assert "--spec-type draft-eagle3" in said


def test_a_build_is_asked_only_where_it_matters() -> None:
    def dialect_of(binary: str) -> Dialect:
        raise AssertionError(f"{binary} was asked")

    one = model(mmproj="eyes.gguf", loras=["one.gguf"])
    assert command(one, GPU, NoPins(), Path("/bin/llama-server"), Path("/kv"), dialect_of).argv


def test_the_dialect_is_read_from_the_help() -> None:
    lines = [f"--flag-{number} N" for number in range(20)]
    assert parse_dialect("\n".join([*lines, "--lora-scaled FNAME SCALE"])) == OLD
    newer = [*lines, "--lora-scaled FNAME:SCALE,...", "--spec-type none,ngram", "-fitt, --fit-target MiB0,MiB1"]
    assert parse_dialect("\n".join(newer)) == Dialect()
    assert parse_dialect("a wrapper script") == Dialect()


def test_a_servers_own_fitting_keeps_the_reserve_free() -> None:
    reserving = replace(GPU, memory_reserve_bytes=2 * GIB + 1)
    assert " -fitt 2049" in argv(model(), reserving)
    assert "-fitt" not in argv(model(), GPU)
    assert "-fitt" not in argv(model(), replace(GPU, memory_reserve_bytes=GIB)), "it keeps that free anyway"
    assert "-fitt" not in argv(model(), reserving, OLD)
    assert "-fitt" not in argv(model(), replace(CPU, memory_reserve_bytes=2 * GIB))
    assert argv(model(server_args={"fit_target": 9}), reserving).count("--fit-target") == 1


def test_a_device_has_its_own_reserve_or_the_nodes() -> None:
    text = """
memory_reserve_bytes: 1000
devices: [{device_id: 'cpu:0'}, {device_id: 'cpu:1', memory_reserve_bytes: 0}]
models: [{model_id: a, path: a.gguf}]
"""
    devices = [CPU, replace(CPU, device_id="cpu:1"), replace(CPU, device_id="cpu:2")]
    config = parse_config(text, Path("/a.yaml"))
    assert [one.memory_reserve_bytes for one in with_reserve(devices, config)] == [1000, 0, 1000]


async def test_what_is_loaded_beside_a_model_counts(tiny_model: Path, tmp_path: Path) -> None:
    adapter, projector = tiny_families.write_adapter(tmp_path), tiny_families.write_projector(tmp_path)
    catalogue = Catalogue()

    async def memory(device: DeviceRef, **keys: Any) -> int:
        one = model(path=str(tiny_model), **keys)
        assert await catalogue.inspect(one) is None
        header = catalogue.header("m")
        assert header is not None
        needed = memory_on_device(header, one, device)
        assert needed is not None
        return needed.total

    for device in (CPU, GPU):
        alone = await memory(device)
        files = adapter.stat().st_size + projector.stat().st_size
        assert await memory(device, mmproj=str(projector), loras=[str(adapter)]) == alone + files
        # The draft is the model itself: it takes the same once more.
        assert await memory(device, draft_model=str(tiny_model)) == 2 * alone
    on_host = {"mmproj": str(projector), "server_args": {"no_mmproj_offload": True}}
    assert await memory(GPU, **on_host) == await memory(GPU)
    missing = model(path=str(tiny_model), draft_model="/missing.gguf")
    assert await catalogue.inspect(missing) == "/missing.gguf: no such file"


@pytest.mark.parametrize("reserve", [0, GIB // 2])
def test_a_model_must_fit_beside_the_reserve(reserve: int, tiny_model: Path) -> None:
    from nodeagent.gguf.header import read_header

    header = read_header(tiny_model)
    device = replace(CPU, memory_reserve_bytes=reserve)
    big = model(ctx_size=4_000_000)  # 488 MiB of cache, and 3.8 GiB of compute buffer
    said = misfit(header, model(ctx_size=500_000), device)
    assert (said is None) == (reserve == 0), said
    assert misfit(header, big, device) is not None
    if said is not None:
        assert said.endswith("and the device has 1.0 GiB, of which 512 MiB are reserved for others")
