"""Each test has one kind, and is held to it."""

import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import PurePath

import pytest
import trio
from trio.testing import MockClock

from kinds import KINDS, PURE, REAL, VIRTUAL, NotOfThisKind, kind_of


def plain() -> None:
    return


def with_its_own_clock() -> None:
    trio.run(trio.sleep, 1, clock=MockClock(autojump_threshold=0))


async def asynchronous() -> None:
    return


def kind(
    path: str, function: Callable[..., object] = plain, fixtures: tuple[str, ...] = (), marks: tuple[str, ...] = ()
) -> str:
    return kind_of(PurePath(path), function, fixtures, marks)


def test_every_collected_test_has_exactly_one_kind(request: pytest.FixtureRequest) -> None:
    wrong = [
        item.nodeid
        for item in request.session.items
        if len(KINDS.intersection(mark.name for mark in item.iter_markers())) != 1
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (kind("supervisor/test_restart.py"), PURE),
        (kind("supervisor/test_restart.py", marks=("parametrize",)), PURE),
        (kind("nodeagent/test_lane.py", asynchronous, ("autojump_clock",)), VIRTUAL),
        (kind("nodeagent/test_lane_properties.py", with_its_own_clock), VIRTUAL),
        (kind("nodeagent/test_relay.py", asynchronous), REAL),
        (kind("supervisor/test_supervisor_real.py"), REAL),
        (kind("endtoend/test_serving.py"), REAL),
        (kind("faults/test_faults_of_children.py"), REAL),
        (kind("nodeagent/config/test_config.py", fixtures=("llama_server",)), REAL),
        (kind("nodeagent/cli/test_cli.py", marks=("real",)), REAL),
    ],
)
def test_the_kind_follows_from_the_file_the_function_the_fixtures_and_the_marks(found: str, expected: str) -> None:
    assert found == expected


@pytest.mark.parametrize(
    "both",
    [
        lambda: kind("endtoend/test_serving.py", asynchronous, ("autojump_clock",)),
        lambda: kind("nodeagent/test_lane.py", asynchronous, ("autojump_clock", "llama_server")),
        lambda: kind("nodeagent/test_lane.py", asynchronous, ("autojump_clock",), ("real",)),
        lambda: kind("supervisor/test_supervisor_real.py", with_its_own_clock),
        lambda: kind("nodeagent/test_lane.py", marks=("pure", "real")),
    ],
)
def test_a_test_of_two_kinds_is_refused(both: Callable[[], str]) -> None:
    with pytest.raises(ValueError, match=" and "):
        both()


def bind() -> None:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))


def look_up() -> None:
    socket.getaddrinfo("127.0.0.1", 80)


def run_a_process() -> int:
    return subprocess.run([sys.executable, "-c", ""], check=False, timeout=30).returncode


@pytest.mark.parametrize("real", [bind, look_up, run_a_process])
def test_a_pure_test_can_start_no_process_and_use_no_network(real: Callable[[], object]) -> None:
    with pytest.raises(NotOfThisKind, match="in a pure test"):
        real()


async def test_a_virtual_test_can_not_either(autojump_clock: MockClock) -> None:
    with pytest.raises(NotOfThisKind, match="in a virtual test"):
        look_up()


@pytest.mark.real
def test_a_real_test_can() -> None:
    bind()
    assert run_a_process() == 0
