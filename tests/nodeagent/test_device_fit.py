"""Why a model is where it is, in words and as a code."""

from pathlib import Path

import pytest
from msgspec.structs import replace
from trio import Nursery
from trio.testing import MockClock, wait_all_tasks_blocked

from fakes.child_process import Fate
from fakes.node_with_fakes import NodeWithFakes
from nodeagent.device_fit import Facts, device_fit
from nodeagent.llama_server.fit import Fit
from nodeagent.scheduling.seam import Obstacle, ServerState, ServerView

GIB = 2**30
ABSENT = Facts(
    device_id="gpu:0",
    fit=Fit(5 * GIB, None),
    server=None,
    obstacle=None,
    why_loaded=None,
    free_bytes=12 * GIB,
    most_bytes=14 * GIB,
    has_place=True,
    offloads_in_part=True,
)


def server(state: ServerState, *, pinned: bool = False, reason: str | None = None) -> ServerView[str]:
    return ServerView(model_id="a", state=state, generation=1, since=0.0, slots=1, pinned=pinned, reason=reason)


@pytest.mark.parametrize(
    ("facts", "state", "why"),
    [
        (ABSENT, "fits", "needs about 5.0 GiB, 12.0 GiB free"),
        (replace(ABSENT, fit=Fit(5 * GIB, None, measured=True)), "fits", "needs 5.0 GiB, 12.0 GiB free"),
        (
            replace(ABSENT, free_bytes=4 * GIB),
            "needs_room",
            "needs about 5.0 GiB, 4.0 GiB free; other models have to give way to it",
        ),
        (
            replace(ABSENT, has_place=False),
            "needs_room",
            "needs about 5.0 GiB, 12.0 GiB free; another model has to give way to it, since no more may be loaded",
        ),
        (
            replace(ABSENT, free_bytes=GIB, most_bytes=4 * GIB),
            "fits_in_part",
            "needs about 5.0 GiB, 1.0 GiB free; a part of it stays in the host's memory",
        ),
        (
            replace(ABSENT, free_bytes=GIB, most_bytes=4 * GIB, offloads_in_part=False),
            "does_not_fit",
            "needs about 5.0 GiB, 1.0 GiB free, and 4.0 GiB without the other models",
        ),
        (replace(ABSENT, free_bytes=None), "unknown", "needs about 5.0 GiB; the free memory is not known"),
        (replace(ABSENT, fit=None), "unknown", "what it needs is not known"),
        (replace(ABSENT, fit=Fit(0, None)), "unknown", "what it needs is not known"),
        (replace(ABSENT, obstacle=Obstacle("too large", None, "does_not_fit")), "does_not_fit", "too large"),
        (replace(ABSENT, obstacle=Obstacle("exited", 5.0, "exited")), "failed", "exited"),
        (replace(ABSENT, server=server(ServerState.READY), why_loaded="preload"), "loaded", "preload"),
        (replace(ABSENT, server=server(ServerState.READY, pinned=True)), "loaded", "not known, pinned"),
        (
            replace(ABSENT, server=server(ServerState.STARTING), why_loaded="for a request"),
            "loading",
            "starting: for a request",
        ),
        (
            replace(ABSENT, server=server(ServerState.BACKING_OFF, reason="exited with code 1")),
            "loading",
            "backing off: exited with code 1",
        ),
        (replace(ABSENT, server=server(ServerState.FAILED)), "fits", "needs about 5.0 GiB, 12.0 GiB free"),
    ],
)
def test_a_model_is_where_it_is_for_a_reason(facts: Facts, state: str, why: str) -> None:
    fit = device_fit(facts)
    assert (fit.state.value, fit.why) == (state, why)


def test_what_a_model_takes_is_known_while_it_runs() -> None:
    loaded = device_fit(replace(ABSENT, server=server(ServerState.READY), fit=Fit(5 * GIB, None, measured=True)))
    assert (loaded.needed_bytes, loaded.taken_bytes, loaded.is_measured) == (5 * GIB, 5 * GIB, True)
    absent = device_fit(ABSENT)
    assert (absent.needed_bytes, absent.taken_bytes, absent.is_measured) == (5 * GIB, None, False)


async def test_who_asked_for_a_load_is_remembered(autojump_clock: MockClock, nursery: Nursery, tmp_path: Path) -> None:
    parts = NodeWithFakes(tmp_path, [Fate()] * 4, device_ids=("cpu:0", "cpu:1"))
    node = await parts.start(nursery)

    def why(model_id: str) -> list[str]:
        [model] = [model for model in node.snapshot(with_fits=True).models if model.model_id == model_id]
        return [f"{fit.device_id}: {fit.state.value}: {fit.why}" for fit in model.fits]

    node.devices["cpu:0"].lane.preload("a")
    await wait_all_tasks_blocked()
    ticket = node.scheduler.admit("r", "b")
    await ticket.granted()
    await wait_all_tasks_blocked()
    assert why("a") == ["cpu:0: loaded: preload", "cpu:1: unknown: what it needs is not known"]
    assert why("b")[1] == "cpu:1: loaded: for a request"
    ticket.close()
    await node.load("b", "cpu:0")
    assert why("b")[0] == "cpu:0: loaded: by an operator"
