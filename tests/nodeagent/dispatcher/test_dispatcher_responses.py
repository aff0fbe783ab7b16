"""What the node does after each response: the table of the protocol."""

import random
from email.utils import formatdate
from time import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.dispatcher.responses import Accepted, DispatcherResponse, Refused, Unknown, Verdict, backoff_s, interpret


@pytest.mark.parametrize(
    ("response", "verdict"),
    [
        (DispatcherResponse(200), Accepted()),
        (DispatcherResponse(201, body=b" "), Accepted()),
        (DispatcherResponse(200, body=b'{"heartbeat_interval_s": 7, "new": 1}'), Accepted(7.0)),
        (DispatcherResponse(200, body=b'{"heartbeat_interval_s": 0.001}'), Accepted(1.0)),
        (DispatcherResponse(200, body=b'{"heartbeat_interval_s": 99999}'), Accepted(300.0)),
        (DispatcherResponse(200, body=b'{"heartbeat_interval_s": null}'), Accepted()),
    ],
)
def test_a_success_can_set_the_interval_within_bounds(response: DispatcherResponse, verdict: Verdict) -> None:
    assert interpret(response) == verdict


@pytest.mark.parametrize(
    "body", [b"garbage", b"[]", b'{"heartbeat_interval_s": "soon"}', b'{"heartbeat_interval_s": NaN}']
)
def test_a_success_with_an_unusable_body_is_a_failure(body: bytes) -> None:
    assert isinstance(interpret(DispatcherResponse(200, body=body)), Refused)


@pytest.mark.parametrize("status", [404, 410])
def test_a_node_that_the_dispatcher_does_not_know_registers_again(status: int) -> None:
    assert isinstance(interpret(DispatcherResponse(status)), Unknown)


@pytest.mark.parametrize(
    ("status", "error"), [(409, True), (401, True), (403, True), (400, False), (500, False), (302, False)]
)
def test_other_statuses_are_failures_and_some_are_errors_for_a_person_to_fix(status: int, error: bool) -> None:
    verdict = interpret(DispatcherResponse(status))
    assert isinstance(verdict, Refused)
    assert (verdict.error, verdict.wait_s) == (error, None)
    assert str(status) in verdict.reason


@pytest.mark.parametrize(
    ("value", "wait_s"),
    [("7", 7.0), ("0", 1.0), ("9999", 300.0), ("soon", None), ("nan", None), (None, None)],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_followed_within_bounds(status: int, value: str | None, wait_s: float | None) -> None:
    verdict = interpret(DispatcherResponse(status, {"retry-after": value} if value is not None else {}))
    assert isinstance(verdict, Refused)
    assert verdict.wait_s == wait_s


def test_retry_after_can_be_a_date() -> None:
    verdict = interpret(DispatcherResponse(503, {"retry-after": formatdate(time() + 20, usegmt=True)}))
    assert isinstance(verdict, Refused)
    assert verdict.wait_s == pytest.approx(20, abs=2)


def test_a_date_that_no_calendar_has_is_no_retry_after() -> None:
    verdict = interpret(DispatcherResponse(503, {"retry-after": "Mon, 01 Jan 99999999999 00:00:00 GMT"}))
    assert isinstance(verdict, Refused)
    assert verdict.wait_s is None


@given(st.integers(1, 10_000), st.integers())
def test_a_back_off_stays_within_its_bounds(failures: int, seed: int) -> None:
    assert 0 <= backoff_s(failures, random.Random(seed)) <= min(60.0, 2.0 ** min(failures - 1, 10))
