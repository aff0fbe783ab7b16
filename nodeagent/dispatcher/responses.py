"""What a dispatcher's response means for the node: the pure part of its client."""

import email.utils
import random
import time
from collections.abc import Mapping

import msgspec
from pydantic import ValidationError

from nodeagent.dispatcher.wire import INTERVAL_MAX_S, INTERVAL_MIN_S, HeartbeatResponse

BACKOFF_FIRST_S = 1.0
BACKOFF_LONGEST_S = 60.0


class DispatcherResponse(msgspec.Struct, frozen=True):
    """The response to a call; `failure` says why there is none."""

    status: int = 0
    headers: Mapping[str, str] | None = None
    body: bytes = b""
    failure: str | None = None


class Accepted(msgspec.Struct, frozen=True):
    """The call succeeded. `interval_s` is the heartbeat interval that the dispatcher asks for, None if it does not."""

    interval_s: float | None = None


class Unknown(msgspec.Struct, frozen=True):
    """The dispatcher does not know this node: register again."""

    reason: str


class Refused(msgspec.Struct, frozen=True):
    """The call failed: repeat it after `wait_s` if the dispatcher gave one, else after a back-off.

    `error` marks what a person has to fix: another incarnation is newer, or the token is wrong.
    """

    reason: str
    wait_s: float | None = None
    error: bool = False


Verdict = Accepted | Unknown | Refused


def interpret(response: DispatcherResponse) -> Verdict:
    """What the node does after this response to a registration or a heartbeat."""
    if response.failure is not None:
        return Refused(response.failure)
    match response.status:
        case status if 200 <= status < 300:
            return _accepted(response)
        case 404 | 410:
            return Unknown(f"responded with {response.status}: it doesn't know this node")
        case 409:
            return Refused("responded with 409: a newer incarnation of this node_id is registered", error=True)
        case 401 | 403:
            return Refused(f"responded with {response.status}: the token is missing or wrong", error=True)
        case 429 | 503:
            return Refused(f"responded with {response.status}", _retry_after_s(response.headers or {}))
        case _:
            return Refused(f"responded with {response.status}")


def backoff_s(failures: int, rng: random.Random) -> float:
    """How long to wait after this many failures in a row: full jitter, up to 1 s, doubling to 60 s."""
    longest = min(BACKOFF_LONGEST_S, BACKOFF_FIRST_S * 2.0 ** min(failures - 1, 10))
    return rng.uniform(0, longest)


def _accepted(response: DispatcherResponse) -> Verdict:
    if not response.body.strip():
        return Accepted()
    try:
        interval_s = HeartbeatResponse.model_validate_json(response.body).heartbeat_interval_s
    except ValidationError as error:
        return Refused(f"responded with {response.status} and an unusable body: {error.errors()[0]['msg']}")
    if interval_s is None:
        return Accepted()
    return Accepted(min(max(interval_s, INTERVAL_MIN_S), INTERVAL_MAX_S))


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """`Retry-After`, given in seconds or as a date, within bounds; None if it is missing or unusable."""
    value = headers.get("retry-after", "")
    try:
        wait_s = float(value)
    except ValueError:
        parsed = email.utils.parsedate_tz(value)
        if parsed is None:
            return None
        try:
            wait_s = email.utils.mktime_tz(parsed) - time.time()
        except (OverflowError, ValueError):  # a year that no calendar has
            return None
    return min(max(wait_s, BACKOFF_FIRST_S), INTERVAL_MAX_S) if wait_s == wait_s else None
