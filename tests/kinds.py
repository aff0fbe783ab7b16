"""The three kinds of tests. Every test gets exactly one mark, and can't do what another kind is for.

`pure`: plain functions, tables and properties. `virtual`: trio with the autojumping clock, and fakes beside it.
`real`: real processes, sockets or time. The autojumping clock beside a real process makes every timeout fire at once,
so a test has never two kinds.
"""

import inspect
from collections.abc import Callable, Collection
from pathlib import PurePath
from typing import Final

PURE: Final = "pure"
VIRTUAL: Final = "virtual"
REAL: Final = "real"
KINDS: Final = {PURE, VIRTUAL, REAL}

REAL_FOLDERS: Final = {"endtoend", "faults"}
REAL_FILE_SUFFIX: Final = "_real"
# Each is a program that runs, or a model for one.
REAL_FIXTURES: Final = {"llama_server", "smollm2"}

# CPython's audit events of what only real tests do (`time.sleep`: from 3.13 on). The socket pair by which trio wakes
# itself raises none of them.
REAL_EVENTS: Final = {
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.system",
    "socket.bind",
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "time.sleep",
}


class NotOfThisKind(BaseException):
    """A `pure` or `virtual` test did what only a `real` one may.

    Not an Exception, so that no code under test catches it.
    """


def kind_of(path: PurePath, function: Callable[..., object], fixtures: Collection[str], marks: Collection[str]) -> str:
    """The kind of a test, by its file below tests/, its function, fixtures and marks. ValueError where it has two.

    An async test runs on the real clock unless it asks for the autojumping one; a property may run trio itself.
    """
    found = KINDS.intersection(marks)
    if "autojump_clock" in fixtures or "MockClock" in function.__code__.co_names:
        found.add(VIRTUAL)
    elif inspect.iscoroutinefunction(function):
        found.add(REAL)
    in_real_place = not REAL_FOLDERS.isdisjoint(path.parts) or path.stem.endswith(REAL_FILE_SUFFIX)
    if in_real_place or not REAL_FIXTURES.isdisjoint(fixtures):
        found.add(REAL)
    if len(found) > 1:
        raise ValueError(f"it is {' and '.join(sorted(found))}: a test has one kind")
    return found.pop() if found else PURE


def refuse_what_is_real(kind: str | None, event: str) -> None:
    """Raise NotOfThisKind where a running test of this kind may not raise this audit event."""
    if kind in (PURE, VIRTUAL) and event in REAL_EVENTS:
        raise NotOfThisKind(f"{event} in a {kind} test: mark it with `pytest.mark.real`, or use a fake")
