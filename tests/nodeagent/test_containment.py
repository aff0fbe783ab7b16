import errno
import logging

import httpx
import pytest
import trio

from nodeagent.containment import Containment, own_shortage


@pytest.mark.parametrize(
    "error", [RuntimeError("a"), RecursionError(), OverflowError(), UnicodeError("b"), KeyError(1)]
)
def test_any_exception_is_contained_and_handed_on(error: Exception) -> None:
    failures: list[Exception] = []
    with Containment("testing", on_failure=failures.append):
        raise error
    assert failures == [error]


def test_a_group_of_exceptions_is_contained_too() -> None:
    with Containment("testing"):
        raise ExceptionGroup("both", [RuntimeError("a"), ValueError("b")])


async def test_a_cancellation_passes() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        with Containment("testing"):
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


def test_an_interrupt_passes() -> None:
    with pytest.raises(KeyboardInterrupt), Containment("testing"):
        raise KeyboardInterrupt


def test_a_repeated_error_is_logged_with_traceback_once_and_then_counted(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    containment = Containment("testing", clock=lambda: now)
    for _ in range(5):
        with containment:
            raise RuntimeError("again")
    assert [record.exc_info is not None for record in caplog.records] == [True]
    now = 61.0
    with containment:
        raise RuntimeError("again")
    assert caplog.messages[-1].endswith("(4 more times since the last report)")
    assert caplog.records[-1].exc_info is None


def test_another_kind_of_error_is_logged_on_its_own(caplog: pytest.LogCaptureFixture) -> None:
    containment = Containment("testing")
    for error in (RuntimeError("a"), ValueError("b")):
        with containment:
            raise error
    assert len(caplog.records) == 2


def test_a_shortage_of_our_own_is_a_warning_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with Containment("accepting connections"):
        raise OSError(errno.EMFILE, "Too many open files")
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert record.exc_info is None
    assert "out of file descriptors (limit " in record.getMessage()
    assert record.getMessage().endswith(" while accepting connections")


def wrapped(inner: Exception) -> Exception:
    try:
        try:
            raise inner
        except Exception as error:
            raise httpx.ConnectError("could not connect") from error
    except httpx.ConnectError as error:
        return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.EMFILE, "x"), "out of file descriptors"),
        (OSError(errno.ENFILE, "x"), "this host is out of file descriptors"),
        (OSError(errno.ENOMEM, "x"), "out of memory"),
        (MemoryError(), "out of memory"),
        (BlockingIOError(errno.EAGAIN, "x"), "out of processes or threads"),
        (wrapped(OSError(errno.EMFILE, "x")), "out of file descriptors"),
        (ExceptionGroup("g", [ValueError(), OSError(errno.EMFILE, "x")]), "out of file descriptors"),
    ],
)
def test_a_shortage_is_found_through_causes_and_groups(error: Exception, expected: str) -> None:
    found = own_shortage(error)
    assert found is not None
    assert found.startswith(expected)


@pytest.mark.parametrize("error", [OSError(errno.ECONNREFUSED, "x"), ValueError(), wrapped(OSError(errno.EPIPE, "x"))])
def test_an_error_of_others_is_no_shortage(error: Exception) -> None:
    assert own_shortage(error) is None
