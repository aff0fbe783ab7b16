"""Each load is measured beside the work: its time, and the memory that it took."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from fakes.one_device import GIB, Files, Hooks, header, model, spec
from nodeagent.devices.values import DeviceMetrics, DeviceRef
from nodeagent.llama_server.control import ControlError
from nodeagent.llama_server.load_meter import LoadMeter, own_bytes
from nodeagent.llama_server.measured_loads import MeasuredLoads
from nodeagent.llama_server.relay import Upstream
from supervisor.snapshot import ChildSnapshot, ChildState


class Gpu:
    """Implements `load_meter.Readings`; its memory is `free_bytes`, read last at `read_at`."""

    def __init__(self) -> None:
        self.free_bytes: int | None = 8 * GIB
        self.read_at = 0.0
        self.last_free_bytes: int | None = 8 * GIB

    def latest(self, device_id: str) -> DeviceMetrics | None:
        return DeviceMetrics(measured_at=self.read_at, memory_free_bytes=self.last_free_bytes)

    async def read_now(self, device_id: str) -> DeviceMetrics:
        self.read_at, self.last_free_bytes = trio.current_time(), self.free_bytes
        return DeviceMetrics(measured_at=self.read_at, memory_free_bytes=self.free_bytes)


class Bench:
    """A meter on one device, whose server is a table."""

    def __init__(self, folder: Path, backend: str, **keys: Any) -> None:
        self.gpu, self.files, self.hooks = Gpu(), Files(), Hooks()
        self.files.headers["a"] = header(size_bytes=4 * GIB)
        self.child: ChildSnapshot | None = None
        self.file = folder / "loads.json"
        self.slot_ctx_size: int | ControlError | None = 4096
        self.meter = self.another(backend, **keys)

    def another(self, backend: str, **keys: Any) -> LoadMeter:
        """A meter as a later run of the agent would make it."""
        device = DeviceRef(**{"device_id": "cpu:0", "backend": backend, "index": 0, "name": "device", **keys})
        return LoadMeter(
            self.hooks,
            MeasuredLoads(self.file),
            [device],
            catalogue=self.files,
            monitor=self.gpu,
            child_of=lambda _child_id: self.child,
            read_slot_ctx_size=self.read_slot_ctx_size,
        )

    async def read_slot_ctx_size(self, _upstream: Upstream) -> int | None:
        if isinstance(self.slot_ctx_size, ControlError):
            raise self.slot_ctx_size
        return self.slot_ctx_size

    async def load(self, takes_s: float, takes_bytes: int = 4 * GIB, *, spawns: bool = True, **keys: Any) -> Upstream:
        one, its, upstream = model("a", **keys), spec("a"), Upstream("127.0.0.1:1", "key")
        self.meter.before_start(one, its)
        if spawns:
            self.child = ChildSnapshot(
                child_id=its.child_id,
                group="cpu:0",
                state=ChildState.READY,
                generation=1,
                since=0.0,
                pid=os.getpid(),
                spawned_at=trio.current_time(),
            )
        await trio.sleep(takes_s)
        assert self.gpu.free_bytes is not None
        self.gpu.free_bytes -= takes_bytes
        await self.meter.after_ready(one, its, upstream)
        self.meter.after_start(its)
        await trio.testing.wait_all_tasks_blocked()
        return upstream

    async def unload(self, frees_bytes: int = 4 * GIB) -> None:
        await self.meter.before_stop(model("a"), spec("a"), Upstream("127.0.0.1:1", "key"))
        assert self.gpu.free_bytes is not None
        self.gpu.free_bytes += frees_bytes

    @property
    def measured(self) -> tuple[float | None, int | None]:
        return self.meter.load_s(model("a"), spec("a")), self.meter.memory_bytes(model("a"), spec("a"))


@asynccontextmanager
async def bench(folder: Path, backend: str = "cuda", **keys: Any) -> AsyncIterator[Bench]:
    it = Bench(folder, backend, **keys)
    async with trio.open_nursery() as nursery:
        await nursery.start(it.meter.run)
        yield it
        nursery.cancel_scope.cancel()


async def until_written(it: Bench) -> None:
    """The file is written in a thread, which takes real time."""
    while not it.file.exists():
        await trio.to_thread.run_sync(lambda: None)


@pytest.mark.real
async def test_a_load_on_a_gpu_is_measured_by_the_devices_memory_and_outlasts_the_agent(tmp_path: Path) -> None:
    with trio.fail_after(30):
        async with bench(tmp_path) as it:
            assert it.measured == (None, None)
            await it.load(0.1)
            await until_written(it)
            load_s, memory_bytes = it.measured
            assert load_s is not None
            assert load_s >= 0.1
            assert memory_bytes == 4 * GIB
            assert it.meter.changes == 1
            assert it.hooks.calls[0] == "before_start a"
            assert "after_start cpu:0/a" in it.hooks.calls
            later = it.another("cuda")
            assert later.memory_bytes(model("a"), spec("a")) == 4 * GIB
            for other in (it.another("cuda", uuid="GPU-2"), it.another("cuda", device_id="cpu:1")):
                assert other.memory_bytes(model("a"), spec("a")) is None, "another device"
            assert later.memory_bytes(model("a"), spec("a", argument="-c 8192")) is None, "other arguments"
            it.files.headers["a"] = header(size_bytes=5 * GIB)
            assert later.memory_bytes(model("a"), spec("a")) is None, "another model"


@pytest.mark.real
async def test_a_server_that_spans_devices_is_measured_by_the_memory_of_all_of_them(tmp_path: Path) -> None:
    members = tuple(DeviceRef(device_id=f"gpu:{it}", backend="cuda", index=it, name="one") for it in (0, 1))
    with trio.fail_after(30):
        async with bench(tmp_path, members=members) as it:
            await it.load(0.0, takes_bytes=2 * GIB)  # on each
            await until_written(it)
            assert it.measured[1] == 4 * GIB


@pytest.mark.real
async def test_a_server_on_the_cpu_is_measured_by_what_it_has_for_itself(tmp_path: Path) -> None:
    with trio.fail_after(30):
        async with bench(tmp_path, "cpu") as it:
            await it.load(0.0)
            await until_written(it)
            _, memory_bytes = it.measured
            assert memory_bytes is not None
            assert 0 < memory_bytes < 4 * GIB
            assert own_bytes(2**22 + 1) is None, "no such process"


@pytest.mark.real
@pytest.mark.parametrize("took_bytes", [-GIB, GIB, 9 * GIB], ids=["freed", "little", "much"])
async def test_a_difference_that_the_load_can_not_explain_is_not_taken(took_bytes: int, tmp_path: Path) -> None:
    with trio.fail_after(30):
        async with bench(tmp_path) as it:
            await it.load(0.0, took_bytes)
            await until_written(it)
            load_s, memory_bytes = it.measured
            assert load_s is not None
            assert memory_bytes is None


@pytest.mark.real
async def test_a_reading_from_before_the_last_change_is_not_compared(tmp_path: Path) -> None:
    with trio.fail_after(30):
        async with bench(tmp_path) as it:
            await it.load(0.0, 0)  # explained by nothing
            await until_written(it)
            await it.unload(0)
            it.gpu.read_at = 0.0
            await it.load(0.0)
            while it.meter.changes < 2:
                await trio.to_thread.run_sync(lambda: None)
            assert it.measured[1] is None
            await it.unload()
            await it.gpu.read_now("cpu:0")  # as before each load that stops another server
            await it.load(0.0)
            while it.meter.changes < 3:
                await trio.to_thread.run_sync(lambda: None)
            assert it.measured[1] == 4 * GIB


async def test_a_server_that_was_ready_already_is_not_a_load(tmp_path: Path, autojump_clock: MockClock) -> None:
    async with bench(tmp_path) as it:
        await it.load(1.0, spawns=False)
        it.child = ChildSnapshot(
            child_id="cpu:0/a", group="cpu:0", state=ChildState.READY, generation=1, since=0.0, spawned_at=-5.0
        )
        await it.load(1.0, spawns=False)
        assert it.meter.changes == 0


@pytest.mark.real
async def test_less_context_than_was_asked_for_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with trio.fail_after(30):
        async with bench(tmp_path) as it:
            upstream = await it.load(0.0, ctx_size=16_384, parallel=2)
            assert upstream.slot_ctx_size == 4096
            assert caplog.messages == [
                "cpu:0/a: each slot has 4096 tokens of context, and 8192 were asked for: "
                "the model was trained for no more"
            ]
            await until_written(it)
            it.slot_ctx_size = ControlError("sent invalid HTTP")
            upstream = await it.load(0.0, ctx_size=16_384)
            while it.meter.changes < 2:
                await trio.to_thread.run_sync(lambda: None)
            assert upstream.slot_ctx_size is None
            assert len(caplog.messages) == 1


@pytest.mark.real
async def test_a_load_that_ran_out_of_memory_is_remembered_across_restarts_until_it_succeeds(tmp_path: Path) -> None:
    with trio.fail_after(30):
        async with bench(tmp_path) as it:
            it.meter.ran_out(model("a"), spec("a"), None)
            assert it.meter.changes == 0, "nothing to forget"
            it.meter.ran_out(model("a"), spec("a"), 7 * GIB)
            assert (it.meter.least_bytes(model("a"), spec("a")), it.meter.changes) == (7 * GIB, 1)
            await until_written(it)
            assert it.another("cuda").least_bytes(model("a"), spec("a")) == 7 * GIB
            assert it.another("cuda").least_bytes(model("a"), spec("a", argument="-ngl 5")) is None
            await it.load(0.1)
            assert it.meter.least_bytes(model("a"), spec("a")) is None
            del it.files.headers["a"]
            it.meter.ran_out(model("a"), spec("a"), 7 * GIB)
            assert it.meter.least_bytes(model("a"), spec("a")) is None, "nothing is known of its file"
