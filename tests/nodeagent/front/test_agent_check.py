"""The line of HAProxy's agent check, by the node's status and its free places."""

from typing import Any, cast

import pytest

from fakes.balanced_node import FakeLane, FakeNode
from nodeagent.front.agent_check import line
from nodeagent.front.seam import Node
from nodeagent.status import NodeStatus


def line_of(status: NodeStatus, *lanes: FakeLane, **more: Any) -> str:
    return line(cast(Node, FakeNode(status, *lanes, **more)))


@pytest.mark.parametrize(
    ("lanes", "expected"),
    [
        ([(0, 0, 2)], "ready up 100% maxconn:2"),
        ([(1, 1, 4)], "ready up 50% maxconn:4"),
        ([(1, 0, 2), (0, 0, 8)], "ready up 90% maxconn:10"),
        ([(1, 1, 2)], "ready up 1% maxconn:2"),
        ([(2, 199, 400)], "ready up 49% maxconn:400"),
        ([(2, 3, 4)], "ready up 1% maxconn:4"),  # the limit was lowered
    ],
)
def test_the_weight_is_the_share_of_free_places_and_maxconn_all_of_them(
    lanes: list[tuple[int, int, int]], expected: str
) -> None:
    assert line_of(NodeStatus.READY, *(FakeLane(*lane) for lane in lanes)) == expected


@pytest.mark.parametrize("status", [NodeStatus.DRAINING, NodeStatus.STOPPING])
def test_a_node_that_drains_or_stops_gets_nothing_new(status: NodeStatus) -> None:
    assert line_of(status, FakeLane(0, 0, 2), reasons=("shutting down",)) == "drain"


def test_a_degraded_node_is_up_as_long_as_it_can_serve_a_model() -> None:
    lane, reasons = FakeLane(0, 0, 2), ("a on gpu:0: exited with code 1",)
    assert line_of(NodeStatus.DEGRADED, lane, reasons=reasons) == "ready up 100% maxconn:2"
    assert line_of(NodeStatus.DEGRADED, lane, reasons=reasons, can_serve=False) == f"down #{reasons[0]}"


def test_a_node_that_starts_is_down_for_a_reason() -> None:
    assert line_of(NodeStatus.STARTING) == "down #models are being preloaded"
    assert line_of(NodeStatus.READY, can_serve=False) == "down #no model can be served"


def test_a_reason_stays_one_bounded_line_of_ascii() -> None:
    reasons = ("a on gpu:0: l\u00e4uft\r\nup ready\x00", "b" * 1000)
    got = line_of(NodeStatus.DEGRADED, reasons=reasons, can_serve=False)
    assert got.startswith("down #a on gpu:0: l uft up ready ; bbb")
    assert len(got) == 206
