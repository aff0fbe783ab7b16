from collections import Counter
from itertools import count
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from nodeagent.scheduling.lease import Ticket
from nodeagent.scheduling.request_queue import RequestQueue

CAPACITY = 3
MODELS = st.sampled_from(["a", "b", "c"])
STEPS = st.lists(
    st.tuples(st.sampled_from(["post", "insert", "insert_first", "remove", "collect"]), MODELS), max_size=40
)


@given(STEPS)
def test_the_counts_by_model_are_those_of_the_queued_tickets(steps: list[tuple[str, str]]) -> None:
    queue = _queue()
    queued: list[Ticket[str]] = []
    numbers = count()
    for step, model_id in steps:
        if step == "collect":
            queue.collect()
        elif step == "remove":
            removed = queued.pop(0) if queued else None
            assert queue.remove(removed or _ticket(next(numbers), model_id)) is (removed is not None)
        else:
            ticket = _ticket(next(numbers), model_id)
            getattr(queue, step)(ticket)
            queued.append(ticket)
        assert dict(queue.models) == Counter(ticket.model_id for ticket in queued)
    queue.collect()
    assert {ticket.number for ticket in queue.waiting} == {ticket.number for ticket in queued}


def test_tickets_are_in_the_order_of_their_age_whatever_way_they_came() -> None:
    queue = _queue()
    for number in (5, 1, 3):
        queue.insert(_ticket(number))
    queue.post(_ticket(4))
    queue.post(_ticket(2))
    queue.insert_first(_ticket(9))
    assert [ticket.number for ticket in queue.waiting] == [9, 1, 2, 3, 4, 5]


def _queue() -> RequestQueue[str]:
    return RequestQueue(CAPACITY, lambda _ticket: None)


def _ticket(number: int, model_id: str = "a") -> Ticket[str]:
    return Ticket(lane=cast(Any, None), number=number, request_id="", model_id=model_id, admitted_at=0.0)
