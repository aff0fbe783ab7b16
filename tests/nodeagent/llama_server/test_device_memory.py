"""The memory of a device that a model spans together with others."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import cast

from fakes.one_device import GIB, Files, Readings, header, model
from nodeagent.devices.values import DeviceRef, joined
from nodeagent.llama_server.device_memory import DeviceMemory
from supervisor.snapshot import ChildSnapshot, ChildState

FIRST = DeviceRef(device_id="gpu:0", backend="cuda", index=0, name="A", memory_total_bytes=12 * GIB)
SECOND = DeviceRef(device_id="gpu:1", backend="cuda", index=1, name="B", memory_total_bytes=4 * GIB)
BOTH = joined([FIRST, SECOND])


def child(state: ChildState, since: float = 0.0) -> ChildSnapshot:
    return cast(ChildSnapshot, SimpleNamespace(state=state, since=since))


def memory_of(device: DeviceRef, running: Mapping[str, ChildSnapshot], *, pinned: bool = False) -> DeviceMemory:
    """6 GiB are free; `wide` takes 8 GiB and a little, of which each device holds its share, `a` 2 GiB."""
    files, readings = Files(), Readings()
    files.headers = {"wide": header(size_bytes=8 * GIB), "a": header(size_bytes=2 * GIB)}
    readings.is_read, readings.free_bytes, readings.measured_at = True, 6 * GIB, 1.0
    memory = DeviceMemory(
        device,
        lambda: [running for _ in device.parts],
        spans=() if device.members else [BOTH],
        catalogue=files,
        monitor=readings,
        measurements=None,
    )
    wide = model("wide", devices=("gpu:0", "gpu:1"), tensor_split=(3.0, 1.0), gpu_layers="all", pinned=pinned)
    memory.configure({"wide": wide, "a": model("a")}, {})
    return memory


def test_a_device_holds_its_share_of_a_spanning_model() -> None:
    whole = memory_of(BOTH, {}).bytes_of("wide")
    assert whole > 8 * GIB
    assert memory_of(FIRST, {}).bytes_of("wide") == int(whole * 0.75)
    assert memory_of(SECOND, {}).bytes_of("wide") == int(whole * 0.25)


def test_what_a_spanning_server_is_about_to_take_is_not_free_on_its_devices() -> None:
    memory = memory_of(SECOND, {"wide": child(ChildState.STARTING)})
    assert memory.free_bytes() == 6 * GIB - memory.bytes_of("wide")
    assert memory_of(SECOND, {"wide": child(ChildState.READY)}).free_bytes() == 6 * GIB


def test_a_spanning_model_gives_way_to_a_model_of_one_device_unless_it_is_pinned() -> None:
    running = {"wide": child(ChildState.READY)}
    memory = memory_of(SECOND, running)
    assert memory.most_bytes("a") == 6 * GIB + memory.bytes_of("wide")
    assert memory.has_room("a", 7 * GIB)
    pinned = memory_of(SECOND, running, pinned=True)
    assert pinned.most_bytes("a") == 6 * GIB
    assert not pinned.has_room("a", 7 * GIB)
    assert pinned.crowded_out("a", 1) == "all places for models are taken by pinned ones (wide)"
    assert pinned.crowded_out("a", 2) == "the pinned models (wide) leave too little memory"


def test_of_several_devices_together_nothing_is_known_to_be_free() -> None:
    memory = memory_of(BOTH, {"a": child(ChildState.READY)})
    assert (memory.free_bytes(), memory.usable_bytes(), memory.most_bytes("wide")) == (None, None, None)
    assert memory.has_room("wide", 99 * GIB)
