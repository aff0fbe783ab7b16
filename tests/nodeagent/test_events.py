"""Events of the node, as they are made from the supervisor's."""

from datetime import UTC, datetime

import pytest

from nodeagent.events import NodeEvent, of_child, of_node
from nodeagent.status import NodeReason
from supervisor.lifecycle import (
    Cause,
    Event,
    Exit,
    Exited,
    GaveUp,
    Ready,
    Restarting,
    Started,
    Stopped,
    Stopping,
    Unhealthy,
)

# A model's id may hold a slash.
CHILD, GENERATION, AT = "gpu:0/org/planner", 3, 17.0

TABLE = [
    (Started(child_id=CHILD, generation=GENERATION, at=AT, pid=1), "starting", None, None),
    (Ready(child_id=CHILD, generation=GENERATION, at=AT, address="127.0.0.1:1"), "ready", None, None),
    (
        Unhealthy(child_id=CHILD, generation=GENERATION, at=AT, cause=Cause.STALLED, reason="no progress"),
        "unhealthy",
        "stalled",
        "no progress",
    ),
    (Stopping(child_id=CHILD, generation=GENERATION, at=AT), "stopping", None, None),
    (
        Exited(
            child_id=CHILD,
            generation=GENERATION,
            at=AT,
            exit=Exit(code=-9, cause=Cause.KILLED_BY_SIGNAL, reason="was killed by SIGKILL", last_lines=("a", "b")),
        ),
        "exited",
        "killed_by_signal",
        "was killed by SIGKILL",
    ),
    (
        Restarting(child_id=CHILD, generation=GENERATION, at=AT, delay_s=1, cause=Cause.EXITED, reason="restarts"),
        "backing_off",
        "exited",
        "restarts",
    ),
    (
        GaveUp(
            child_id=CHILD, generation=GENERATION, at=AT, cause=Cause.START_TIMEOUT, reason="given up", retry_at=None
        ),
        "failed",
        "start_timeout",
        "given up",
    ),
    (Stopped(child_id=CHILD, generation=GENERATION, at=AT), "stopped", None, None),
]


@pytest.mark.parametrize(("event", "kind", "code", "reason"), TABLE, ids=lambda value: type(value).__name__)
def test_each_event_of_the_supervisor_becomes_one_of_the_node(
    event: Event, kind: str, code: str | None, reason: str | None
) -> None:
    made = of_child(event)
    assert (made.kind, made.device_id, made.model_id) == (kind, "gpu:0", "org/planner")
    assert (made.generation, made.reason_code, made.reason) == (GENERATION, code, reason)
    assert made.last_lines == (("a", "b") if kind == "exited" else ())


def test_no_event_of_the_supervisor_is_missing_here_and_no_two_have_the_same_kind() -> None:
    # By name: a dataclass with slots is made twice, and both classes are subclasses.
    assert {type(event).__name__ for event, *_ in TABLE} == {kind.__name__ for kind in Event.__subclasses__()}
    assert len({kind for _, kind, *_ in TABLE}) == len(TABLE)


def test_the_event_of_the_node_has_its_reasons_as_text_and_the_first_code() -> None:
    codes = (NodeReason.SHUTTING_DOWN, NodeReason.SERVER_FAILED)
    event = of_node("draining", ("shutting down", "a on cpu:0: exited"), codes)
    assert (event.kind, event.reason) == ("node", "draining; shutting down; a on cpu:0: exited")
    assert event.as_json()["reason_code"] == "shutting_down"
    assert of_node("ready", (), ()).reason_code is None


def test_an_event_as_json_has_every_field() -> None:
    at = datetime(2026, 11, 23, 18, 7, 11, 250_000, tzinfo=UTC)
    assert NodeEvent(at=at, kind="exited", model_id="a", reason_code="exited", last_lines=("x",)).as_json() == {
        "at": "2026-11-23T18:07:11.250Z",
        "kind": "exited",
        "device_id": None,
        "model_id": "a",
        "generation": None,
        "reason": None,
        "reason_code": "exited",
        "last_lines": ["x"],
    }
    assert NodeEvent(at=at, kind="node").as_json().keys() == set(NodeEvent.__struct_fields__)
