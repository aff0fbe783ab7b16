"""Servers that run out of a device's memory: what is noted, what follows for the next load, and what is told."""

import pytest
import trio
from trio.testing import MockClock

from fakes.child_process import Fate
from fakes.one_device import GIB, Device, header, running_device
from nodeagent.errors import OutOfDeviceMemory
from nodeagent.llama_server.allocations import asked_bytes
from nodeagent.scheduling.lane import Lane, LaneRules
from nodeagent.scheduling.seam import ServerState

MIB = 2**20
# What llama.cpp's CUDA build prints, by ggml-cuda.cu, ggml-backend.cpp, llama-model.cpp and server.cpp.
OUT_OF_MEMORY = b"""\
ggml_backend_cuda_buffer_type_alloc_buffer: allocating 4096.00 MiB on device 0: cudaMalloc failed: out of memory
alloc_tensor_range: failed to allocate CUDA0 buffer of size 4294967296
llama_model_load: error loading model: unable to allocate CUDA0 buffer
llama_model_load_from_file_impl: failed to load model
main: exiting due to model loading error
"""
RUNS_OUT = Fate(ready_after_s=None, exits_after_s=1.0, prints=OUT_OF_MEMORY)


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("alloc: allocating 4096.50 MiB on device 0: cudaMalloc failed: out of memory", 4096 * MIB + MIB // 2),
        ("alloc_tensor_range: failed to allocate ROCm0 buffer of size 42949672960", 40 * GIB),
        ("ggml_gallocr_reserve_n: failed to allocate Vulkan0 buffer of size 319029248", 319029248),
        ("ggml_vulkan: Device memory allocation of size 1073741824 failed.", GIB),
        ("ggml_metal_buffer_init: error: failed to allocate buffer, size = 4096.00 MiB", 4 * GIB),
        ("alloc: can't allocate 4294967296 Bytes of memory on device", 4 * GIB),
        ("alloc_tensor_range: failed to allocate CPU buffer of size 1000", None),
        ("alloc_tensor_range: failed to allocate CUDA_Host buffer of size 1000", None),
        (f"ggml_vulkan: Device memory allocation of size {'9' * 400} failed.", None),
        ("CUDA error: out of memory", None),
    ],
)
def test_what_the_failed_load_asked_for_is_read_from_its_output(line: str, asked: int | None) -> None:
    assert asked_bytes(["loading", line, "exiting"]) == asked
    assert asked_bytes([]) is None


def set_up(device: Device, takes: dict[str, int]) -> None:
    """8 GiB, of which each running server takes that many."""
    device.files.headers |= {"a": header(size_bytes=2 * GIB), "b": header(size_bytes=3 * GIB)}

    def free_now() -> int:
        return 8 * GIB - sum(takes[name.rpartition("/")[2]] for name in device.spawner.running)

    device.readings.free_now = free_now


async def test_the_error_has_the_figures_and_the_same_load_is_not_tried_again(autojump_clock: MockClock) -> None:
    async with running_device(RUNS_OUT, backend="cuda") as device:
        set_up(device, {"a": 2 * GIB})
        refused = await device.refused()
        assert isinstance(refused, OutOfDeviceMemory)
        assert refused.least_bytes == 8 * GIB + 64 * MIB
        assert refused.reason == (
            "cpu:0: out of device memory: it exited with code 1; the model needs about 2.2 GiB (2.0 GiB of weights + "
            "160 MiB of KV cache + 5 MiB of compute buffer), its server asked for 4.0 GiB at once, the device has "
            "8.0 GiB, 8.0 GiB are free now"
        )
        await trio.sleep(1000)  # the cool-down is over
        said = "needs more than 8.1 GiB, as a load showed that failed, and the device has 8.0 GiB"
        assert (await device.refused()).reason == f"cpu:0: {said}"
        assert len(device.spawner.processes) == 1
        assert device.servers.bytes_of("a") == 8 * GIB + 64 * MIB
        assert device.servers.reset_failure("a"), "an operator wants it"
        await device.servers.ensure("a")


async def test_it_is_tried_again_as_soon_as_more_memory_is_free(autojump_clock: MockClock) -> None:
    async with running_device(RUNS_OUT, backend="cuda") as device:
        device.files.headers["a"] = header(size_bytes=2 * GIB)
        device.readings.is_read, device.readings.free_bytes = True, 5 * GIB
        await device.refused()
        device.readings.free_bytes = 5 * GIB + 10 * MIB
        obstacle = device.servers.obstacle("a")
        assert obstacle is not None
        assert obstacle.reason_code == "out_of_device_memory"
        assert obstacle.reason.startswith(
            "out of device memory: a load showed that at least 5.1 GiB have to be free, and at most 5.0 GiB can be; "
        )
        device.readings.free_bytes = 6 * GIB  # another program has ended
        assert device.servers.obstacle("a") is None
        await device.servers.ensure("a")
        assert device.view().state is ServerState.READY


async def test_nothing_is_started_if_too_little_is_free_once_the_others_are_gone(autojump_clock: MockClock) -> None:
    async with running_device(Fate(), backend="cuda") as device:
        set_up(device, {"a": 2 * GIB, "b": 0})
        await device.servers.ensure("b")
        device.readings.free_now, device.readings.is_read = None, True
        device.readings.free_bytes = 4 * GIB
        device.measured.ran_out(device.models["a"], device.specs["a"], 5 * GIB)
        assert device.servers.obstacle("a") is None, "b seems to take 3 GiB"
        refused = await device.refused()
        assert isinstance(refused, OutOfDeviceMemory)
        assert "at least 5.0 GiB have to be free, and at most 4.0 GiB can be" in refused.reason
        assert len(device.spawner.processes) == 1


async def test_a_server_that_runs_out_of_memory_while_it_serves_counts_as_well(autojump_clock: MockClock) -> None:
    async with running_device(Fate(exits_after_s=5.0, prints=b"CUDA error: out of memory\n"), backend="cuda") as device:
        set_up(device, {"a": 2 * GIB})
        await device.servers.ensure("a")
        await device.upstream().closed.wait()
        await trio.sleep(0.1)
        assert device.view().reason_code == "out_of_device_memory"
        assert device.servers.obstacle("a") is None, "the next load finds out how much there was"
        assert isinstance(await device.refused(), OutOfDeviceMemory)
        assert device.servers.obstacle("a") is not None
        assert len(device.spawner.processes) == 1


async def test_what_is_free_long_after_a_server_ran_out_says_nothing(autojump_clock: MockClock) -> None:
    async with running_device(Fate(exits_after_s=5.0, prints=b"CUDA error: out of memory\n"), backend="cuda") as device:
        set_up(device, {"a": 2 * GIB})
        await device.servers.ensure("a")
        await trio.sleep(30)
        obstacle = device.servers.obstacle("a")
        assert obstacle is not None
        assert obstacle.retry_at == pytest.approx(105), "it cools down"
        await trio.sleep(80)
        await device.servers.ensure("a")
        assert device.measured.least == {}


async def test_without_a_reading_it_cools_down(autojump_clock: MockClock) -> None:
    async with running_device(Fate(ready_after_s=None, exits_after_s=1.0, prints=b"CUDA error: out of memory\n")) as it:
        refused = await it.refused()
        assert isinstance(refused, OutOfDeviceMemory)
        assert refused.least_bytes is None
        obstacle = it.servers.obstacle("a")
        assert obstacle is not None
        assert obstacle.retry_at == pytest.approx(101)
        await trio.sleep(101)
        await it.servers.ensure("a")


async def test_the_lane_makes_room_and_the_second_try_serves_the_request(autojump_clock: MockClock) -> None:
    """The whole way, over the real supervisor: `a` is thought to fit beside `b`, and does not."""
    async with running_device(Fate(), RUNS_OUT, Fate(), backend="cuda") as device, trio.open_nursery() as nursery:
        set_up(device, {"a": 6 * GIB, "b": 3 * GIB})
        rules = LaneRules(max_pending=4, queue_timeout_s=100, startup_timeout_s=30, max_models=2)
        lane = Lane("cpu:0", device.servers, rules)
        await nursery.start(lane.run)
        for model_id in ("b", "a"):
            ticket = lane.submit("r", model_id)
            await ticket.granted()
            ticket.close()
        assert [it.name for it in device.spawner.processes] == ["cpu:0/b", "cpu:0/a", "cpu:0/a"]
        assert [view.model_id for view in device.servers.views()] == ["a"]
        assert device.measured.least == {"a": 5 * GIB + 64 * MIB}
        nursery.cancel_scope.cancel()
