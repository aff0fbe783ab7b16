"""A node that drains, at an operator's request or because the agent was asked to end: over fake processes."""

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from fakes.child_process import Fate
from fakes.node_with_fakes import NodeWithFakes, loaded, request_in_flight
from nodeagent.errors import Draining, ShuttingDown
from nodeagent.node import Node
from nodeagent.status import NodeReason, NodeStatus, Phase

SLOW = Fate(ready_after_s=5.0)
DIES = Fate(exits_after_s=2.0)
GRACE_S = 5.0
PRELOADED = [{"model_id": "a", "path": "a.gguf", "preload": True}, {"model_id": "b", "path": "b.gguf"}]


def accepts(node: Node) -> bool:
    try:
        node.scheduler.admit("request", "a").close()
    except Draining:
        return False
    return True


# At an operator's request.


async def test_a_drained_node_says_so_at_once_and_refuses_requests_after_the_grace_until_undrain(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path, drain_grace_s=GRACE_S).start(nursery)
    node.drain()
    state = node.state()
    assert (state.status, state.reasons) == (NodeStatus.DRAINING, ("drained by an operator",))
    assert state.reason_codes == (NodeReason.DRAINED_BY_OPERATOR,)
    await trio.sleep(GRACE_S - 0.1)
    assert accepts(node)
    node.drain()  # the second one changes nothing, nor does it prolong the grace
    await trio.sleep(0.2)
    with pytest.raises(Draining) as refusal:
        node.scheduler.admit("request", "a")
    assert refusal.value.by_operator
    for _ in range(2):
        node.undrain()
    assert (node.state().status, node.state().reasons) == (NodeStatus.READY, ())
    await trio.sleep(10 * GRACE_S)
    assert accepts(node)
    assert [(event.reason, event.reason_code) for event in node.events.after(0).items if event.kind == "node"] == [
        ("ready", None),
        ("draining; drained by an operator", "drained_by_operator"),
        ("ready", None),
    ]


@pytest.mark.parametrize("after_s", [0.0, 2.0, GRACE_S])
async def test_an_undrain_within_the_grace_leaves_nothing_of_the_drain(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path, after_s: float
) -> None:
    node = await NodeWithFakes(tmp_path, drain_grace_s=GRACE_S).start(nursery)
    node.drain()
    await trio.sleep(after_s)
    node.undrain()
    await trio.sleep(10 * GRACE_S)
    assert node.state().status is NodeStatus.READY
    assert accepts(node)


async def test_each_drain_has_a_grace_of_its_own(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path, drain_grace_s=GRACE_S).start(nursery)
    node.drain()
    await trio.sleep(GRACE_S - 1)
    node.undrain()
    node.drain()
    await trio.sleep(GRACE_S - 1)
    assert accepts(node)
    await trio.sleep(2)
    assert not accepts(node)


async def test_a_drain_is_said_although_a_preload_goes_on(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path, [SLOW], models=PRELOADED).start(nursery)
    node.preload()
    node.drain()
    assert node.state().status is NodeStatus.DRAINING


# At the end of the agent.


async def test_a_drain_can_not_be_undone_once_the_agent_was_asked_to_end(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path).start(nursery)
    node.drain()
    node.begin_shutdown()
    node.drain()
    node.refuse_requests()
    with pytest.raises(ShuttingDown, match="can't accept requests again"):
        node.undrain()
    assert (node.state().status, node.state().reasons) == (NodeStatus.DRAINING, ("shutting down",))
    assert node.state().reason_codes == (NodeReason.SHUTTING_DOWN,)
    await trio.sleep(10 * GRACE_S)
    with pytest.raises(Draining) as refusal:
        node.scheduler.admit("request", "a")
    assert not refusal.value.by_operator
    node.enter(Phase.STOPPING)
    assert (node.state().status, node.state().reasons) == (NodeStatus.STOPPING, ("shutting down",))
    with pytest.raises(ShuttingDown):
        node.undrain()


async def test_requests_are_still_accepted_when_a_shutdown_begins(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path).start(nursery)
    node.begin_shutdown()
    ticket = await request_in_flight(node, "a")
    assert node.admitted == 1
    ticket.close()
    assert node.admitted == 0


async def test_a_shutdown_within_the_grace_of_an_operators_drain_decides_when_requests_are_refused(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path, drain_grace_s=GRACE_S).start(nursery)
    node.drain()
    await trio.sleep(GRACE_S - 1)
    node.begin_shutdown()
    await trio.sleep(2)
    assert accepts(node)


async def test_an_operator_can_load_a_model_on_a_drained_node_but_not_on_one_that_shuts_down(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path, drain_grace_s=0).start(nursery)
    node.drain()
    await trio.sleep(1)
    assert await node.load("a", None) == "cpu:0"
    node.begin_shutdown()
    with pytest.raises(ShuttingDown, match="can't load a model"):
        await node.load("b", None)
    with pytest.raises(ShuttingDown):
        node.load_soon("b", None)
    assert loaded(node) == ["cpu:0/a"]


# No server is started while the node drains, unless a request waits for it.


@pytest.mark.parametrize("drain", [Node.drain, Node.begin_shutdown], ids=["operator", "shutdown"])
async def test_a_server_that_dies_while_the_node_drains_is_not_restarted(
    drain: object, autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    parts = NodeWithFakes(tmp_path, [DIES], drain_grace_s=0)
    node = await parts.start(nursery)
    await node.load("a", None)
    assert callable(drain)
    drain(node)
    await trio.sleep(600)
    assert len(parts.spawner.processes) == 1
    assert loaded(node) == []
    assert node.state().status is NodeStatus.DRAINING
    assert "cpu:0/a is not restarted: the node drains, and no request waits for it" in caplog.messages


async def test_a_server_that_is_about_to_be_restarted_when_the_drain_begins_is_not(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    dies_early = Fate(exits_after_s=2.0)
    parts = NodeWithFakes(tmp_path, [dies_early, dies_early])
    node = await parts.start(nursery)
    await node.load("a", None)
    await trio.sleep(4.01)  # the second one has died, and a third is due in half a second at the earliest
    node.drain()
    await trio.sleep(600)
    assert len(parts.spawner.processes) == 2


async def test_a_server_that_dies_while_the_node_drains_is_restarted_for_a_request_that_waits(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path, [DIES])
    node = await parts.start(nursery)
    ticket = await request_in_flight(node, "a")
    node.begin_shutdown()
    await trio.sleep(3)
    assert loaded(node) == []
    node.scheduler.requeue(ticket)  # as the front does with a request whose server died before its first byte
    with trio.fail_after(60):
        await ticket.granted()
    assert loaded(node) == ["cpu:0/a"]
    ticket.close()


async def test_a_request_that_comes_within_the_grace_has_its_model_loaded(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path).start(nursery)
    node.drain()
    (await request_in_flight(node, "a")).close()
    assert loaded(node) == ["cpu:0/a"]


async def test_a_server_that_died_while_the_node_drained_is_loaded_again_after_undrain(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    node = await NodeWithFakes(tmp_path, [DIES]).start(nursery)
    await node.load("a", None)
    node.drain()
    await trio.sleep(60)
    node.undrain()
    (await request_in_flight(node, "a")).close()
    assert loaded(node) == ["cpu:0/a"]


async def test_a_preload_that_has_not_begun_waits_for_the_end_of_the_drain(
    autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    parts = NodeWithFakes(tmp_path, models=PRELOADED)
    node = await parts.start(nursery)
    node.drain()
    node.preload()
    await trio.sleep(60)
    assert parts.spawner.processes == []
    node.undrain()
    await trio.sleep(1)
    assert loaded(node) == ["cpu:0/a"]
