"""The servers of one device when the configuration changes, and when a failure is reset, in virtual time."""

import trio
from trio.testing import MockClock

from fakes.child_process import Fate
from fakes.one_device import CRASHES, GIB, header, model, running_device, spec
from nodeagent.scheduling.seam import ServerState


async def test_a_server_whose_command_line_changes_is_named_and_restarted_by_the_next_load(
    autojump_clock: MockClock,
) -> None:
    async with running_device() as device:
        await device.servers.ensure("a")
        device.specs = {"a": spec("a", argument="-c 4096"), "b": spec("b")}
        assert device.servers.replace(device.models, device.specs, 1000) == ["a"]
        assert device.view().state is ServerState.READY
        await device.servers.ensure("a")
        assert len(device.spawner.processes) == 2
        assert "before_stop a at 127.0.0.1:1" not in device.hooks.calls, "its model is configured otherwise now"
        assert device.servers.replace(device.models, device.specs, 1000) == []


async def test_a_server_that_would_only_be_supervised_differently_runs_on(autojump_clock: MockClock) -> None:
    async with running_device() as device:
        await device.servers.ensure("a")
        device.specs = {"a": spec("a", max_restarts=9), "b": spec("b")}
        assert device.servers.replace(device.models, device.specs, 1000) == []
        await device.servers.ensure("a")
        assert len(device.spawner.processes) == 1


async def test_the_running_server_of_a_model_that_is_removed_is_named_and_still_shown(
    autojump_clock: MockClock,
) -> None:
    async with running_device(parallel=4) as device:
        await device.servers.ensure("a")
        assert device.servers.replace({"b": device.models["b"]}, {"b": device.specs["b"]}, 1000) == ["a"]
        assert (device.view().state, device.view().slots) == (ServerState.READY, 1)
        obstacle = device.servers.obstacle("a")
        assert obstacle is not None
        assert (obstacle.reason, obstacle.reason_code) == ("it is no longer configured", "not_configured")
        assert [worker.stall_timeout_s for worker in device.servers.workers(120.0)] == [120.0]
        await device.servers.stop("a")
        assert device.servers.views() == []
        assert device.hooks.calls[-1] == "after_start cpu:0/a"


async def test_what_is_said_of_a_ready_server_follows_the_configuration(autojump_clock: MockClock) -> None:
    async with running_device(parallel=4) as device:
        await device.servers.ensure("a")
        before = device.view()
        assert (before.slots, before.idle_unload_s) == (4, None)
        assert device.view() is before, "every request looks at it"
        models = device.models | {"a": model("a", parallel=4, idle_unload_s=60)}
        device.servers.replace(models, device.specs, 1000)
        assert device.view().idle_unload_s == 60


async def test_whether_a_model_fits_follows_its_file_and_the_configuration(autojump_clock: MockClock) -> None:
    async with running_device(backend="cuda", gpu_layers=99) as device:
        assert device.servers.obstacle("a") is None, "nothing is known of its file"
        device.files.headers["a"] = header(size_bytes=8 * GIB)
        assert device.servers.obstacle("a") is not None
        device.servers.replace(device.models | {"a": model("a", gpu_layers=1)}, device.specs, 1000)
        assert device.servers.obstacle("a") is None
        device.servers.replace(device.models, device.specs, 1000)
        assert device.servers.obstacle("a") is not None
        device.files.headers["a"] = header(size_bytes=4 * GIB)
        assert device.servers.obstacle("a") is None


async def test_a_server_from_before_a_reload_does_not_show_that_the_model_fits_now(autojump_clock: MockClock) -> None:
    async with running_device(backend="cuda", gpu_layers=1) as device:
        device.files.headers["a"] = header(size_bytes=8 * GIB)
        await device.servers.ensure("a")
        assert device.servers.obstacle("a") is None
        models = device.models | {"a": model("a", gpu_layers=99)}
        specs = device.specs | {"a": spec("a", argument="-ngl 99")}
        assert device.servers.replace(models, specs, 1000) == ["a"]
        obstacle = device.servers.obstacle("a")
        assert obstacle is not None
        assert obstacle.reason_code == "does_not_fit"
        assert device.servers.replace(device.models, device.specs, 1000) == []
        assert device.servers.obstacle("a") is None


async def test_a_model_that_has_failed_may_be_started_at_once_if_its_configuration_changes(
    autojump_clock: MockClock,
) -> None:
    async with running_device(CRASHES, CRASHES, CRASHES) as device:
        await device.give_up_on("a")
        device.servers.replace(device.models, device.specs, 1000)
        assert device.servers.obstacle("a") is not None
        device.specs = {"a": spec("a", argument="-c 4096"), "b": spec("b")}
        device.servers.replace(device.models, device.specs, 1000)
        assert device.servers.obstacle("a") is None
        await device.servers.ensure("a")


async def test_a_failed_model_that_is_removed_is_no_longer_shown(autojump_clock: MockClock) -> None:
    async with running_device(CRASHES, CRASHES, CRASHES) as device:
        await device.give_up_on("a")
        device.servers.replace({"b": device.models["b"]}, {"b": device.specs["b"]}, 1000)
        assert device.servers.views() == []


async def test_a_removed_model_whose_server_fails_later_is_not_shown(autojump_clock: MockClock) -> None:
    async with running_device(Fate(exits_after_s=5.0), CRASHES, CRASHES) as device:
        await device.servers.ensure("a")
        device.servers.replace({"b": device.models["b"]}, {"b": device.specs["b"]}, 1000)
        await trio.sleep(6)
        assert device.view().state in (ServerState.BACKING_OFF, ServerState.STARTING)
        await trio.sleep(30)
        assert device.servers.views() == []


async def test_a_failure_can_be_reset(autojump_clock: MockClock) -> None:
    async with running_device(CRASHES, CRASHES, CRASHES) as device:
        assert not device.servers.reset_failure("a")
        await device.give_up_on("a")
        assert device.servers.reset_failure("a")
        assert device.servers.views() == []
        await device.servers.ensure("a")
        assert not device.servers.reset_failure("a")


async def test_a_reload_while_another_server_is_being_stopped_is_not_missed(autojump_clock: MockClock) -> None:
    async with running_device(Fate(ignores_sigterm=True)) as device, trio.open_nursery() as nursery:
        await device.servers.ensure("b")
        nursery.start_soon(device.servers.ensure, "a")
        await trio.sleep(1)
        assert [view.state for view in device.servers.views()] == [ServerState.STOPPING]
        specs = device.specs | {"a": spec("a", argument="new")}
        assert device.servers.replace(device.models, specs, 1000) == [], "it does not run yet"
    assert device.spawner.argvs[-1] == ("llama-server", "a", "new")


async def test_a_model_that_a_reload_removes_while_another_server_is_being_stopped_is_not_started(
    autojump_clock: MockClock,
) -> None:
    async with running_device(Fate(ignores_sigterm=True)) as device, trio.open_nursery() as nursery:
        await device.servers.ensure("b")

        async def replace() -> None:
            await trio.sleep(1)
            device.servers.replace({"b": device.models["b"]}, {"b": device.specs["b"]}, 1000)

        nursery.start_soon(replace)
        assert (await device.refused("a")).reason == "cpu:0: it is no longer configured"
        assert len(device.spawner.processes) == 1
