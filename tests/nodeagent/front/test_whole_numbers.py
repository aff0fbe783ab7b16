"""Numbers in queries and headers: whatever a client writes is a number within bounds, or an error that names it."""

import re
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from fakes.asgi import Exchange
from fakes.gates import open_gate
from nodeagent.errors import InvalidRequest
from nodeagent.events import Ring
from nodeagent.front.app import create_app
from nodeagent.front.seam import ModelCard, Node
from nodeagent.front.whole_numbers import MOST, whole_number

HUGE = "9" * 5000


@given(
    st.one_of(st.one_of(st.integers(-5, 110), st.integers(0, 2 * MOST)).map(str), st.text(max_size=25), st.just(HUGE))
)
def test_what_is_read_is_within_bounds_and_anything_else_an_error_that_names_the_field(text: str) -> None:
    if re.fullmatch("[0-9]{1,19}", text) and 1 <= int(text) <= 100:
        assert whole_number("n", text, 1, 100) == int(text)
        return
    with pytest.raises(InvalidRequest) as refused:
        whole_number("n", text, 1, 100)
    assert refused.value.param == "n"
    assert len(refused.value.message) < 500


@pytest.mark.parametrize(
    ("text", "number"), [("0", 0), ("007", 7), (str(MOST), MOST), (str(MOST + 1), None), ("٣", None), ("1_0", None)]
)
def test_digits_of_ascii_are_read_up_to_the_largest(text: str, number: int | None) -> None:
    if number is None:
        with pytest.raises(InvalidRequest):
            whole_number("n", text)
    else:
        assert whole_number("n", text) == number


class NodeWithLogs:
    """What the routes of logs and events need of a node."""

    node_id = "box-a"
    max_request_bytes = 1000
    scheduler: Any = None
    gate = open_gate()
    cors_origins = ()
    host_names: frozenset[str] = frozenset()

    def __init__(self) -> None:
        self.events: Ring[Any] = Ring(10)

    def cards(self) -> list[ModelCard]:
        return []

    def log_of(self, _device_id: str) -> Ring[str]:
        return Ring(10)


async def answered(method: str, path: str, query: str = "", *headers: tuple[bytes, bytes]) -> Exchange:
    exchange = Exchange((b"authorization", b"Bearer token"), *headers, method=method, path=path)
    exchange.scope["query_string"] = query.encode()
    await exchange.through(create_app(cast(Node, NodeWithLogs())))
    return exchange


@pytest.mark.parametrize(
    ("path", "query", "header", "name"),
    [
        ("/v1/node/devices/cpu:0/logs", f"lines={HUGE}", None, "lines"),
        ("/v1/node/devices/cpu:0/logs", "lines=-1", None, "lines"),
        ("/v1/node/events", "follow=false", HUGE, "Last-Event-ID"),
        ("/v1/node/events", f"follow=false&after={HUGE}", None, "Last-Event-ID"),
        ("/v1/node/activity", "follow=true", HUGE, "Last-Event-ID"),
        ("/v1/node/activity", f"since={HUGE}", None, "since"),
    ],
)
async def test_a_number_of_thousands_of_digits_is_the_clients_error(
    path: str, query: str, header: str | None, name: str, autojump_clock: MockClock
) -> None:
    headers = [] if header is None else [(b"last-event-id", header.encode())]
    exchange = await answered("GET", path, query, *headers)
    assert exchange.sent[0]["status"] == 400
    assert exchange.content["error"]["param"] == name


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/node/activity/"), ("DELETE", "/v1/node/requests/")])
async def test_one_in_a_path_is_not_found(method: str, path: str, autojump_clock: MockClock) -> None:
    assert (await answered(method, path + HUGE)).sent[0]["status"] == 404
    assert (await answered(method, path + HUGE[:100])).sent[0]["status"] == 404
