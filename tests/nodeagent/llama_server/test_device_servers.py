"""The servers of one device, over the real supervisor and fake processes, in virtual time."""

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from fakes.child_process import Fate
from fakes.one_device import CRASHES, GIB, NEVER_READY, header, model, running_device
from nodeagent.config import ModelConfig
from nodeagent.errors import BackendUnavailable
from nodeagent.scheduling.seam import ServerState


async def test_ensure_returns_once_the_server_is_ready(autojump_clock: MockClock) -> None:
    async with running_device(Fate(ready_after_s=2.0), parallel=2, idle_unload_s=30) as device:
        assert device.servers.views() == []
        assert not device.servers.runs("a")
        await device.servers.ensure("a")
        view = device.view()
        assert (view.state, view.slots, view.idle_unload_s, view.generation) == (ServerState.READY, 2, 30, 1)
        assert device.upstream().address == "127.0.0.1:1"
        assert device.upstream().api_key == "key"
        assert device.servers.runs("a")
        assert repr(device.servers) == "<DeviceServers cpu:0: running ['a']>"


async def test_a_server_that_is_ready_is_not_started_again(autojump_clock: MockClock) -> None:
    async with running_device() as device:
        await device.servers.ensure("a")
        upstream = device.upstream()
        await device.servers.ensure("a")
        assert len(device.spawner.processes) == 1
        assert device.upstream() is upstream


async def test_the_server_of_another_model_is_stopped_first_and_the_memory_is_waited_for(
    autojump_clock: MockClock,
) -> None:
    async with running_device() as device:
        await device.servers.ensure("a")
        assert device.readings.settled_at == []
        first = device.upstream()
        await device.servers.ensure("b")
        assert [view.model_id for view in device.servers.views()] == ["b"]
        assert len(device.readings.settled_at) == 1
        assert first.closed.is_set()
        assert device.hooks.calls == [
            *("before_start a", "after_ready a at 127.0.0.1:1", "after_start cpu:0/a"),
            "before_stop a at 127.0.0.1:1",
            *("before_start b", "after_ready b at 127.0.0.1:2", "after_start cpu:0/b"),
        ]


async def test_the_servers_that_are_named_run_on_beside_it(autojump_clock: MockClock) -> None:
    async with running_device() as device:
        await device.servers.ensure("a")
        await device.servers.ensure("b", beside={"a"})
        assert {view.model_id: view.state for view in device.servers.views()} == {
            "a": ServerState.READY,
            "b": ServerState.READY,
        }
        assert device.readings.settled_at == [], "nothing was stopped"
        assert [worker.child_id for worker in device.servers.workers(60)] == ["cpu:0/a", "cpu:0/b"]
        device.process.kill()
        await trio.sleep(0.1)
        assert device.view("a").state is ServerState.READY, "each has a life of its own"


async def test_pinned_models_that_leave_no_room_are_an_obstacle(autojump_clock: MockClock) -> None:
    async with running_device(backend="cuda") as device:
        device.models = {"a": model("a", pinned=True), "b": model("b")}
        device.servers.replace(device.models, device.specs, 1000, max_models=1)
        assert device.servers.obstacle("b") is None, "it is not loaded yet"
        await device.servers.ensure("a")
        assert device.view("a").pinned
        assert device.servers.obstacle("a") is None
        crowded = device.servers.obstacle("b")
        assert crowded is not None
        assert (crowded.reason, crowded.reason_code) == (
            "all places for models are taken by pinned ones (a)",
            "no_room_beside_pinned",
        )
        device.servers.replace(device.models, device.specs, 1000, max_models=2)
        assert device.servers.obstacle("b") is None
        device.files.headers |= {"a": header(size_bytes=5 * GIB), "b": header(size_bytes=4 * GIB)}
        crowded = device.servers.obstacle("b")
        assert crowded is not None
        assert crowded.reason == "the pinned models (a) leave too little memory"
        device.files.headers["b"] = header(size_bytes=2 * GIB)
        assert device.servers.obstacle("b") is None
        device.readings.is_read, device.readings.free_bytes, device.readings.measured_at = True, GIB, 1.0
        crowded = device.servers.obstacle("b")
        assert crowded is not None
        assert crowded.reason == "the pinned models (a) and other programs leave too little memory"


async def test_a_start_that_fails_is_refused_with_the_time_of_the_restart(autojump_clock: MockClock) -> None:
    async with running_device(CRASHES, CRASHES) as device:
        await device.refused()
        refused = await device.refused()  # it joined the restart, which failed too
        assert len(device.spawner.processes) == 2
        assert refused.reason == "cpu:0: exited with code 1"
        assert refused.retry_after_s is not None
        assert refused.retry_after_s > 0
        view = device.view()
        assert (view.state, view.reason_code, view.endpoint) == (ServerState.BACKING_OFF, "exited", None)
        assert view.retry_at == pytest.approx(trio.current_time() + refused.retry_after_s)
        assert device.hooks.calls[-1] == "after_start cpu:0/a"


async def test_the_last_lines_of_a_server_that_exited_are_for_operators_only(
    autojump_clock: MockClock,
) -> None:
    async with running_device(CRASHES) as device:
        refusals = []

        async def ensure() -> None:
            refusals.append(await device.refused())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ensure)
            await trio.sleep(0.5)
            device.process.output.feed(b"loading\nno memory\n")
        [refused] = refusals
        assert refused.reason == "cpu:0: exited with code 1"
        assert refused.for_operators().reason == "cpu:0: exited with code 1; it last printed: loading | no memory"
        view = device.view()
        assert view.reason is not None
        assert "no memory" not in view.reason
        assert view.last_lines == ("loading", "no memory")


@pytest.mark.parametrize(
    ("fate", "code"),
    [
        (CRASHES, "exited"),
        (Fate(ready_after_s=None, exits_after_s=1.0, code=-9), "killed_by_signal"),
        (OSError(2, "No such file or directory"), "spawn_failed"),
        (NEVER_READY, "start_timeout"),
    ],
    ids=["exited", "killed", "not spawned", "not ready"],
)
async def test_the_code_of_a_failed_start_is_its_cause(
    fate: Fate | OSError, code: str, autojump_clock: MockClock
) -> None:
    async with running_device(fate) as device:
        await device.refused()
        assert (device.view().state, device.view().reason_code) == (ServerState.BACKING_OFF, code)


async def test_a_server_that_is_reported_as_stalled_is_unhealthy_with_that_code(autojump_clock: MockClock) -> None:
    async with running_device(Fate(ignores_sigterm=True)) as device:
        await device.servers.ensure("a")
        upstream = device.upstream()
        device.supervisor.fail("cpu:0/a", 1, "no progress")
        await trio.sleep(0.1)
        view = device.view()
        assert (view.state, view.reason, view.reason_code) == (ServerState.UNHEALTHY, "no progress", "stalled")
        assert (view.endpoint, device.servers.workers(1.0)) == (None, [])
        await upstream.closed.wait()
        assert not upstream.ends_as_asked


async def test_a_model_that_was_given_up_on_is_an_obstacle_until_it_has_cooled_down(
    autojump_clock: MockClock,
) -> None:
    async with running_device(CRASHES, CRASHES, CRASHES) as device:
        await device.give_up_on("a")
        view = device.view()
        obstacle = device.servers.obstacle("a")
        assert obstacle is not None
        assert (obstacle.reason, obstacle.retry_at, obstacle.reason_code) == (view.reason, view.retry_at, "exited")
        assert not device.servers.runs("a")
        refused = await device.refused()
        assert refused.reason == f"cpu:0: {view.reason}"
        assert len(device.spawner.processes) == 3
        assert obstacle.retry_at is not None
        await trio.sleep_until(obstacle.retry_at)
        assert device.servers.obstacle("a") is None
        await device.servers.ensure("a")
        assert device.view().state is ServerState.READY


async def test_a_model_that_is_given_up_on_while_its_file_is_checked_is_refused(autojump_clock: MockClock) -> None:
    async with running_device(CRASHES, CRASHES, CRASHES) as device:
        await device.refused()
        assert device.view().state is ServerState.BACKING_OFF
        device.files.takes_s = 60.0
        refused = await device.refused()
        assert device.view().state is ServerState.FAILED
        assert len(device.spawner.processes) == 3
        assert refused.retry_after_s is not None
        assert 0 < refused.retry_after_s < 100


async def test_a_restart_is_an_obstacle_only_if_it_comes_later_than_requests_wait(autojump_clock: MockClock) -> None:
    async with running_device(CRASHES, CRASHES, patience_s=1000) as patient:
        await patient.refused()
        assert patient.servers.obstacle("a") is None
    async with running_device(CRASHES, CRASHES, patience_s=0) as impatient:
        await impatient.refused()
        obstacle = impatient.servers.obstacle("a")
        assert obstacle is not None
        assert (obstacle.retry_at, obstacle.reason_code) == (impatient.view().retry_at, "exited")


async def test_an_unusable_file_is_a_failed_server_and_refuses_the_load(autojump_clock: MockClock) -> None:
    async with running_device() as device:
        device.files.problems["a"] = "/m/a.gguf: no such file"
        refused = await device.refused()
        assert (refused.reason, refused.retry_after_s) == ("/m/a.gguf: no such file", None)
        [view] = device.servers.views()
        assert (view.model_id, view.state, view.reason) == ("a", ServerState.FAILED, "/m/a.gguf: no such file")
        assert view.reason_code == "model_file_unusable"
        with pytest.raises(BackendUnavailable, match="no such file"):
            await device.servers.prepare("a")
        assert device.spawner.processes == []


async def test_a_model_that_does_not_fit_is_refused_before_its_file_is_checked(autojump_clock: MockClock) -> None:
    async with running_device(backend="cuda", gpu_layers=99) as device:
        device.files.headers["a"] = header(size_bytes=8 * GIB)
        device.files.headers["b"] = header(size_bytes=4 * GIB)
        obstacle = device.servers.obstacle("a")
        assert obstacle is not None
        assert (obstacle.reason_code, obstacle.retry_at) == ("does_not_fit", None)
        assert (await device.refused()).reason == f"cpu:0: {obstacle.reason}"
        assert device.servers.obstacle("b") is None
        assert device.spawner.processes == []


@pytest.mark.parametrize(
    ("backend", "free_bytes", "room"),
    [
        ("cuda", None, True),
        ("cuda", 5 * GIB, True),
        ("cuda", 4 * GIB, False),
        ("cpu", 1 * GIB, True),
        ("cpu", 0, False),
    ],
)
async def test_a_copy_has_room_if_its_estimate_fits_into_the_free_memory(
    backend: str, free_bytes: int | None, room: bool, autojump_clock: MockClock
) -> None:
    async with running_device(backend=backend) as device:
        device.files.headers["a"] = header(size_bytes=4 * GIB)
        assert device.servers.has_room("a"), "nothing was measured"
        device.readings.is_read, device.readings.free_bytes = True, free_bytes
        assert device.servers.memory_free_bytes() == free_bytes
        assert device.servers.has_room("a") is room
        assert device.servers.has_room("b"), "nothing is known of its file"


async def test_what_a_load_took_beats_the_estimate(autojump_clock: MockClock) -> None:
    async with running_device(backend="cuda", gpu_layers=99) as device:
        device.files.headers["a"] = header(size_bytes=9 * GIB)
        device.readings.is_read, device.readings.free_bytes = True, 6 * GIB
        assert device.servers.obstacle("a") is not None
        device.measured.bytes["a"] = 5 * GIB
        device.measured.changes += 1
        assert device.servers.obstacle("a") is None
        assert device.servers.has_room("a")
        device.measured.bytes["a"] = 7 * GIB
        device.measured.changes += 1
        assert device.servers.obstacle("a") is None
        assert not device.servers.has_room("a")
        device.measured.seconds["b"] = 3.5
        assert device.servers.measured_loads_s() == {"b": 3.5}


async def test_the_memory_of_the_server_that_would_be_stopped_counts_as_free(autojump_clock: MockClock) -> None:
    async with running_device(backend="cuda") as device:
        device.files.headers |= {"a": header(size_bytes=4 * GIB), "b": header(size_bytes=5 * GIB)}
        device.readings.is_read, device.readings.free_bytes = True, 2 * GIB
        assert not device.servers.has_room("b")
        await device.servers.ensure("a")
        assert device.servers.has_room("b")
        device.servers.replace({"b": device.models["b"]}, {"b": device.specs["b"]}, 1000)
        assert not device.servers.has_room("b"), "the file of a model that was removed is unknown"


async def test_the_context_of_a_server_is_shown_once_it_is_known(autojump_clock: MockClock) -> None:
    async with running_device() as device:
        await device.servers.ensure("a")
        assert device.view().slot_ctx_size is None
        device.upstream().slot_ctx_size = 2048
        assert device.view().slot_ctx_size == 2048


async def test_a_server_that_is_stopped_says_so_to_its_requests_and_one_that_crashes_does_not(
    autojump_clock: MockClock,
) -> None:
    async with running_device(Fate(exits_after_s=5.0)) as device:
        await device.servers.ensure("a")
        crashed = device.upstream()
        await crashed.closed.wait()
        assert not crashed.ends_as_asked
        await device.servers.ensure("a")
        stopped = device.upstream()
        assert stopped is not crashed
        await device.servers.stop("a")
        assert stopped.closed.is_set()
        assert stopped.ends_as_asked


@pytest.mark.parametrize(
    ("limit", "blameless_end"),
    [(None, None), ("limit 1 bytes", "out of memory (limit 1 bytes): it was killed by SIGKILL")],
)
async def test_a_server_that_the_kernel_killed_for_want_of_memory_says_so_to_its_requests(
    limit: str | None, blameless_end: str | None, autojump_clock: MockClock
) -> None:
    async with running_device(Fate(exits_after_s=5.0, code=-9, out_of_memory=limit)) as device:
        await device.servers.ensure("a")
        killed = device.upstream()
        await killed.closed.wait()
        assert killed.blameless_end == blameless_end
        restarted = device.view().state is not ServerState.FAILED
        assert restarted is (limit is None), "with the same arguments it would run out of memory again"


async def test_a_server_that_ran_out_of_the_devices_memory_fails_with_the_figures(autojump_clock: MockClock) -> None:
    async with running_device(Fate(ready_after_s=None, exits_after_s=5.0), backend="cuda") as device:
        device.files.headers["a"] = header(size_bytes=4 * GIB)
        device.readings.is_read, device.readings.free_bytes = True, 3 * GIB
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def exits() -> None:
                await trio.sleep(1)
                device.process.output.feed(b"cudaMalloc failed: out of memory\n")

            said = (await device.refused()).reason
        figures = (
            "the model needs about 4.2 GiB (4.0 GiB of weights + 160 MiB of KV cache + 5 MiB of compute buffer), "
            "the device has 8.0 GiB, 3.0 GiB are free now"
        )
        assert said == f"cpu:0: out of device memory: it exited with code 1; {figures}"
        await trio.sleep(1)
        view = device.view()
        assert (view.state, view.reason_code) == (ServerState.FAILED, "out_of_device_memory")
        assert len(device.spawner.processes) == 1, "not tried again with the same arguments"
        obstacle = device.servers.obstacle("a")
        assert obstacle is not None
        assert obstacle.reason.endswith(figures)
        assert (await device.refused()).reason.endswith(figures)


async def test_a_server_that_is_stopped_before_it_was_ready_has_no_requests(autojump_clock: MockClock) -> None:
    async with running_device(NEVER_READY) as device:
        with trio.move_on_after(2):
            await device.servers.ensure("a")
        assert device.view().state is ServerState.STARTING
        await device.servers.stop("a")
        assert device.servers.views() == []
        assert device.hooks.calls == ["before_start a", "after_start cpu:0/a"]


async def test_the_stall_watch_gets_the_ready_server(autojump_clock: MockClock) -> None:
    async with running_device(Fate(ready_after_s=2.0), stall_timeout_s=7) as device:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.servers.ensure, "a")
            await trio.sleep(1)
            assert device.servers.workers(120.0) == []
        [worker] = device.servers.workers(120.0)
        assert (worker.child_id, worker.generation, worker.pid) == ("cpu:0/a", 1, device.process.pid)
        assert (worker.stall_timeout_s, worker.counts_cpu) == (7, True)
        assert worker.upstream is device.upstream()


async def test_the_cpu_time_of_a_gpu_server_does_not_count(autojump_clock: MockClock) -> None:
    async with running_device(backend="cuda") as device:
        await device.servers.ensure("a")
        assert [(worker.counts_cpu, worker.stall_timeout_s) for worker in device.servers.workers(120.0)] == [
            (False, 120.0)
        ]


async def test_a_server_counts_as_starting_until_after_ready_is_done(autojump_clock: MockClock) -> None:
    async with running_device(Fate(ready_after_s=1.0)) as device:
        device.hooks.ready_takes_s = 2.0
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.servers.ensure, "a")
            await trio.sleep(2.5)
            assert (device.view().state, device.view().endpoint) == (ServerState.STARTING, None)
        assert device.view().state is ServerState.READY
        assert device.hooks.calls[-1] == "after_start cpu:0/a"


async def test_a_start_that_is_cancelled_in_after_ready_leaves_a_ready_server(autojump_clock: MockClock) -> None:
    async with running_device() as device:
        device.hooks.ready_takes_s = 100.0
        with trio.move_on_after(5):
            await device.servers.ensure("a")
        assert device.view().state is ServerState.READY
        assert device.hooks.calls[-1] == "after_start cpu:0/a"


async def test_a_start_that_can_not_be_prepared_is_refused(autojump_clock: MockClock) -> None:
    async with running_device() as device:
        device.hooks.error = OSError(28, "No space left on device", "/state/kv")
        assert (await device.refused()).reason == "cpu:0: /state/kv: No space left on device"
        assert device.spawner.processes == []
        assert device.hooks.calls == ["before_start a"]


async def test_prepare_reads_the_file_of_the_next_model_ahead(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    (tmp_path / "a.gguf").write_bytes(bytes(5000))
    async with running_device() as device:
        device.models["a"] = ModelConfig(model_id="a", path=tmp_path / "a.gguf")
        with trio.fail_after(5):
            await device.servers.prepare("a")
    assert "cpu:0: reading ahead 5000 bytes of a" in caplog.messages


async def test_what_a_server_takes_that_the_last_reading_does_not_show_yet_is_not_free(
    autojump_clock: MockClock,
) -> None:
    async with running_device(Fate(ready_after_s=5.0), Fate(exits_after_s=1.0), backend="cuda") as device:
        device.files.headers |= {"a": header(size_bytes=4 * GIB), "b": header(size_bytes=2 * GIB)}
        device.readings.is_read, device.readings.free_bytes = True, 8 * GIB
        need = device.servers.bytes_of("a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(device.servers.ensure, "a")
            await trio.sleep(4)
            assert device.servers.memory_free_bytes() == 8 * GIB - need, "it is about to take that"
        assert device.servers.memory_free_bytes() == 8 * GIB - need, "the last reading was before it was ready"
        await trio.sleep(1)
        device.readings.measured_at, device.readings.free_bytes = trio.current_time(), 3 * GIB
        assert device.servers.memory_free_bytes() == 3 * GIB
        device.spawner.processes[0].kill()
        await trio.sleep(0.5)
        assert device.view("a").state is ServerState.READY, "restarted at once"
        await trio.sleep(1)
        assert device.view("a").state is ServerState.BACKING_OFF
        device.readings.measured_at, device.readings.free_bytes = trio.current_time(), 8 * GIB
        assert device.servers.memory_free_bytes() == 8 * GIB - need, "it comes back"


async def test_without_a_reading_what_others_run_is_not_free_either(autojump_clock: MockClock) -> None:
    async with running_device(backend="metal") as device:
        device.files.headers |= {"a": header(size_bytes=4 * GIB), "b": header(size_bytes=5 * GIB)}
        assert device.servers.memory_free_bytes() is None
        await device.servers.ensure("b")
        assert device.servers.memory_free_bytes() == 8 * GIB - device.servers.bytes_of("b")
