"""A whole node, over fake processes, one of whose models spans two of its three devices."""

import json
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.child_process import Fate
from fakes.node_with_fakes import NodeWithFakes, loaded, request_in_flight
from nodeagent.errors import BackendUnavailable, QueueFull, ReloadRefused
from nodeagent.front import agent_check
from nodeagent.front.looks import look
from nodeagent.node import Node
from nodeagent.scheduling.queueing import Priority

GPUS = ["gpu:0", "gpu:1", "gpu:2"]
MODELS = [
    {"model_id": "wide", "path": "wide.gguf", "devices": ["gpu:1", "gpu:0"]},
    {"model_id": "a", "path": "a.gguf", "devices": ["gpu:0"]},
    {"model_id": "b", "path": "b.gguf", "devices": ["gpu:1"]},
]
BOTH = "gpu:1+gpu:0"


def node_of(folder: Path, *fates: Fate, **keys: Any) -> NodeWithFakes:
    return NodeWithFakes(folder, fates, device_ids=GPUS, **{"models": MODELS, **keys})


def shown(node: Node) -> dict[str, tuple[list[str], list[str], int, int]]:
    """Of each device the servers, by whom it is used, and the requests in flight and waiting."""
    return {
        it["device_id"]: (
            [server["model_id"] for server in it["servers"]],
            it["used_by"],
            it["lane"]["in_flight"],
            it["lane"]["waiting"],
        )
        for it in json.loads(node.inventory_json())["devices"]
    }


def queues(node: Node) -> dict[str, Any]:
    """The queue of each device, as it is shown."""
    return {lane["device_id"]: lane for lane in json.loads(look(node, "/v1/node/queue", {}))["lanes"]}


async def test_a_spanning_server_is_shown_under_its_first_device_and_as_the_user_of_the_others(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = node_of(tmp_path)
    node = await parts.start(nursery)
    ticket = await request_in_flight(node, "wide")
    queued = node.scheduler.admit("second", "wide")
    assert ticket.lease is not None
    assert ticket.lease.device_id == BOTH
    assert parts.spawner.running == {f"{BOTH}/wide"}
    assert shown(node) == {"gpu:0": ([], ["wide"], 0, 0), "gpu:1": (["wide"], [], 1, 1), "gpu:2": ([], [], 0, 0)}
    [server] = json.loads(node.inventory_json())["devices"][1]["servers"]
    assert server["device_ids"] == ["gpu:1", "gpu:0"]
    assert [lane["held_for"] for lane in queues(node).values()] == [["wide"], ["wide"], []]
    tickets = queues(node)["gpu:1"]["tickets"]
    assert [(it["request_id"], it["state"], it["position"]) for it in tickets] == [
        ("request", "granted", None),
        ("second", "waiting", 1),
    ]
    assert queues(node)["gpu:0"]["tickets"] == []
    queued.close()
    ticket.close()
    await wait_all_tasks_blocked()
    assert [lane["held_for"] for lane in queues(node).values()] == [[], [], []]
    assert [*queues(node)] == GPUS
    assert node.log_of(BOTH) is node.log_of("gpu:1")


async def test_places_are_those_of_the_first_device(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await node_of(tmp_path, max_pending_requests_per_device=2).start(nursery)
    tickets = [await request_in_flight(node, "wide"), node.scheduler.admit("second", "b")]
    for model_id in ("wide", "b"):
        with pytest.raises(QueueFull):
            node.scheduler.admit("third", model_id)
    tickets.append(node.scheduler.admit("third", "a"))
    assert node.admitted == 3
    for ticket in tickets:
        ticket.close()


async def test_models_of_one_device_take_turns_with_the_spanning_one(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = node_of(tmp_path)
    node = await parts.start(nursery)
    a, b = await request_in_flight(node, "a"), await request_in_flight(node, "b")
    wide = node.scheduler.admit("wide", "wide")
    await wait_all_tasks_blocked()
    later = node.scheduler.admit("later", "a")
    a.close()
    await wait_all_tasks_blocked()
    assert later.lease is not None, "the loaded model has its turn"
    later.close()
    for _ in range(100_000):  # its file is looked at first, in a thread, for which the virtual clock does not wait
        if node.devices["gpu:0"].lane.held_for:
            break
        await trio.lowlevel.checkpoint()
    await wait_all_tasks_blocked()
    assert node.devices["gpu:0"].lane.held_for == ["wide"], "the first device is taken, and waits for the second"
    assert loaded(node) == ["gpu:0/a", "gpu:1/b"]
    [(_, starts_in_s)] = node.devices[BOTH].lane.expected_starts()
    assert starts_in_s is not None
    assert starts_in_s > 3, "the request in flight on the second device, then the load"
    assert node.devices[BOTH].lane.loads_now is None
    assert node.details("wide").state == "unloaded"
    b.close()
    await wide.granted()
    assert loaded(node) == [f"{BOTH}/wide"]
    after = node.scheduler.admit("after", "b", Priority.INTERACTIVE)
    await trio.sleep(1)
    assert after.lease is None, "never while the spanning one is in use"
    wide.close()
    await after.granted()
    assert loaded(node) == ["gpu:1/b"]
    after.close()


async def test_a_crash_or_an_unload_of_the_spanning_server_frees_every_device(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = node_of(tmp_path, Fate(exits_after_s=3.0))
    node = await parts.start(nursery)
    ticket = await request_in_flight(node, "wide")
    await trio.sleep(3.5)
    assert node.backend_exits.keys() == {("gpu:1", "wide", "exited")}
    ticket.close()
    a = await request_in_flight(node, "a")
    assert loaded(node) == ["gpu:0/a"]
    a.close()
    await node.load("wide", None)
    assert loaded(node) == [f"{BOTH}/wide"]
    assert await node.unload("wide", force=False) == [BOTH]
    assert loaded(node) == []
    await wait_all_tasks_blocked()
    assert [node.devices[it].lane.held_for for it in GPUS] == [[], [], []]


async def test_a_crash_in_mid_request_is_retried_and_the_devices_stay_consistent(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await node_of(tmp_path, Fate(exits_after_s=3.0)).start(nursery)
    ticket = await request_in_flight(node, "wide")
    b = node.scheduler.admit("b", "b")
    await trio.sleep(3.5)
    node.scheduler.requeue(ticket)
    assert (await ticket.granted()).generation == 2
    ticket.close()
    await b.granted()
    b.close()


async def test_a_load_is_asked_for_at_any_of_its_devices_and_refused_elsewhere(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await node_of(tmp_path).start(nursery)
    for device_id in (None, "gpu:0", "gpu:1", BOTH):
        assert await node.load("wide", device_id) == BOTH
    with pytest.raises(BackendUnavailable, match="gpu:2: it is kept to gpu:1 and gpu:0"):
        await node.load("wide", "gpu:2")
    with pytest.raises(BackendUnavailable, match="gpu:1: it is kept to gpu:0"):
        await node.load("a", "gpu:1")


async def test_the_fit_of_a_model_is_shown_for_the_devices_that_it_may_run_on(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    models = [*MODELS, {"model_id": "c", "path": "c.gguf"}]
    node = await node_of(tmp_path, models=models).start(nursery)
    await node.load("wide", None)
    models_shown = json.loads(node.inventory_json())["models"]
    assert {it["model_id"]: [(fit["device_id"], fit["state"]) for fit in it["fits"]] for it in models_shown} == {
        "wide": [(BOTH, "loaded")],
        "a": [("gpu:0", "unknown")],
        "b": [("gpu:1", "unknown")],
        "c": [(gpu, "unknown") for gpu in GPUS],
    }


async def test_what_a_spanning_server_tells_is_counted_for_its_first_device(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await node_of(tmp_path).start(nursery)
    await node.load("wide", None)
    assert [names for *names, _server in node.scheduler.ready_servers()] == [["gpu:1", "wide"]]
    assert node.backend_load_s.keys() == {("gpu:1", "wide")}
    assert agent_check.line(node) == f"ready up 100% maxconn:{3 * node.config.max_pending_requests_per_device}"


async def test_a_model_with_one_device_is_placed_only_there(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await node_of(tmp_path, max_pending_requests_per_device=8).start(nursery)
    tickets = [node.scheduler.admit(str(number), "a") for number in range(4)]
    await trio.sleep(10)
    assert {ticket.lane.device_id for ticket in tickets} == {"gpu:0"}
    for ticket in tickets:
        ticket.close()


async def test_spanning_and_other_models_are_preloaded_where_there_is_room(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    models = [{**model, "preload": True} for model in MODELS]
    models.append({"model_id": "c", "path": "c.gguf", "preload": True})
    node = await node_of(tmp_path, models=models).start(nursery)
    node.preload()
    await trio.sleep(5)
    assert sorted(loaded(node)) == [f"{BOTH}/wide", "gpu:2/c"]


async def test_a_pinned_spanning_model_keeps_others_off_its_devices_and_is_kept_off_by_them(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await node_of(tmp_path, models=[{**model, "pinned": True} for model in MODELS]).start(nursery)
    await node.load("wide", None)
    with pytest.raises(BackendUnavailable, match=r"gpu:0: all places for models are taken by pinned ones \(wide\)"):
        node.scheduler.admit("request", "a")
    await node.unload("wide", force=False)
    await node.load("b", None)
    with pytest.raises(BackendUnavailable, match=r"all places for models are taken by pinned ones \(b\)"):
        node.scheduler.admit("request", "wide")


async def test_a_node_whose_only_model_has_failed_on_its_devices_cannot_serve(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = node_of(tmp_path, models=MODELS[:1])
    parts.catalogue.unusable["wide"] = "no such file"
    node = await parts.start(nursery)
    assert not node.state().can_serve
    assert node.state().reasons == (f"wide on {BOTH}: no such file",)


async def test_a_reload_may_move_a_model_but_not_make_a_new_group(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = node_of(tmp_path)
    node = await parts.start(nursery)
    await node.load("a", None)
    parts.write_config(models=[MODELS[0], {**MODELS[1], "devices": ["gpu:2"]}])
    assert (await node.reload()).changed == ("a",)
    await trio.sleep(1)
    assert loaded(node) == []
    assert await node.load("a", None) == "gpu:2"
    for devices, said in ((["gpu:0", "gpu:2"], "restart it to add such a model"), (["gpu:5"], "found 'gpu:5'")):
        parts.write_config(models=[{**MODELS[0], "devices": devices}])
        with pytest.raises(ReloadRefused) as refused:
            await node.reload()
        assert said in str(refused.value)
