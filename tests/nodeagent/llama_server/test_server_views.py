"""What scheduling sees of a child, as tables."""

from dataclasses import replace
from pathlib import Path

import pytest

from nodeagent.config import ModelConfig
from nodeagent.llama_server.reason_codes import ReasonCode
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.server_views import (
    code_of,
    last_lines_of,
    view_of_child,
    view_of_unusable_model,
)
from nodeagent.scheduling.seam import ServerState
from supervisor.lifecycle import Cause
from supervisor.snapshot import ChildSnapshot, ChildState

MODEL = ModelConfig(model_id="m", path=Path("m.gguf"), parallel=3, idle_unload_s=60)
CHILD = ChildSnapshot(
    child_id="cpu:0/m", group="cpu:0", state=ChildState.READY, generation=7, since=5.0, pid=1, spawned_at=4.0
)


def no_lines() -> list[str]:
    raise AssertionError("the lines of a server that runs are not read")


def test_the_codes_are_the_causes_of_the_supervisor_and_those_of_the_agents_own() -> None:
    own = {"model_file_unusable", "does_not_fit", "no_room_beside_pinned", "kept_elsewhere", "not_configured"}
    assert {code.value for code in ReasonCode} == own | {cause.value for cause in Cause}


def test_a_ready_child_is_a_ready_server_with_its_endpoint() -> None:
    upstream = Upstream("127.0.0.1:1", "key")
    view = view_of_child("m", MODEL, CHILD, upstream, still_starting=False)
    assert (view.model_id, view.state, view.endpoint) == ("m", ServerState.READY, upstream)
    assert (view.generation, view.since, view.spawned_at, view.slots) == (7, 5.0, 4.0, 3)
    assert (view.idle_unload_s, view.reason, view.reason_code, view.retry_at) == (60, None, None, None)


def test_a_ready_child_that_still_starts_is_a_starting_server_without_an_endpoint() -> None:
    view = view_of_child("m", MODEL, CHILD, Upstream("127.0.0.1:1", "key"), still_starting=True)
    assert (view.state, view.endpoint) == (ServerState.STARTING, None)


@pytest.mark.parametrize("state", [state for state in ChildState if state is not ChildState.STOPPED])
@pytest.mark.parametrize("still_starting", [False, True])
def test_each_state_of_a_child_is_the_servers_state_of_that_name(state: ChildState, still_starting: bool) -> None:
    child = replace(CHILD, state=state)
    view = view_of_child("m", MODEL, child, None, still_starting=still_starting)
    expected = "starting" if state is ChildState.READY and still_starting else state.value
    assert view.state.value == expected


def test_a_server_whose_model_is_no_longer_configured_has_one_slot_and_no_idle_limit() -> None:
    view = view_of_child("m", None, CHILD, None, still_starting=False)
    assert (view.slots, view.idle_unload_s) == (1, None)


@pytest.mark.parametrize("cause", Cause)
def test_every_cause_has_a_code(cause: Cause) -> None:
    child = replace(CHILD, state=ChildState.FAILED, cause=cause, reason="why", retry_at=9.0)
    view = view_of_child("m", MODEL, child, None, still_starting=False)
    assert (view.reason, view.reason_code, view.retry_at) == ("why", cause.value, 9.0)
    assert code_of(child) == cause.value


def test_the_last_lines_are_those_of_a_child_that_has_ended() -> None:
    lines = ["loading", "out of memory", "bye"]
    exited = replace(CHILD, state=ChildState.BACKING_OFF, cause=Cause.EXITED, reason="restart in 1 s")
    assert last_lines_of(exited, lambda: lines) == ("out of memory", "loading", "bye")
    failed = replace(exited, state=ChildState.FAILED)
    assert last_lines_of(failed, lambda: list("abcdefg")) == tuple("cdefg")
    assert last_lines_of(failed, list) == ()
    unhealthy = replace(CHILD, state=ChildState.UNHEALTHY, cause=Cause.STALLED, reason="no progress")
    assert last_lines_of(unhealthy, no_lines) == last_lines_of(CHILD, no_lines) == ()


def test_the_last_lines_are_apart_from_the_reason() -> None:
    failed = replace(CHILD, state=ChildState.FAILED, cause=Cause.EXITED, reason="exited with code 1")
    view = view_of_child("m", MODEL, failed, None, last_lines=("no memory",), still_starting=False)
    assert (view.reason, view.last_lines) == ("exited with code 1", ("no memory",))


def test_a_model_with_an_unusable_file_has_a_failed_server() -> None:
    view = view_of_unusable_model(MODEL, "m.gguf: no such file", 12.0)
    assert (view.state, view.generation, view.since, view.slots) == (ServerState.FAILED, 0, 12.0, 3)
    assert (view.reason, view.reason_code) == ("m.gguf: no such file", "model_file_unusable")
