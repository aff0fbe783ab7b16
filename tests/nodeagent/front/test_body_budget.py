"""The budget of all request bodies: which body makes room for which, in virtual time."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from nodeagent.errors import ServerBusy
from nodeagent.front.body_budget import BodyBudget, RequestBody

LIMIT = 1000


class Upload:
    """A body, and the client that sends it."""

    def __init__(self, budget: BodyBudget, announced: int = LIMIT) -> None:
        self._send, receive = trio.open_memory_channel[dict[str, Any]](100)
        self.body = RequestBody({b"content-length": b"%d" % announced}, receive.receive, budget, LIMIT)
        self.got: bytes | None = None
        self.refused: ServerBusy | None = None

    async def run(self) -> None:
        try:
            self.body.admit()
            self.got = await self.body.read(lambda _part: None)
        except ServerBusy as busy:
            self.refused = busy
            self.body.release()

    async def send(self, count: int, *, more: bool = True) -> None:
        self._send.send_nowait({"type": "http.request", "body": bytes(count), "more_body": more})
        await wait_all_tasks_blocked()


def uploads(nursery: trio.Nursery, budget: BodyBudget, count: int) -> list[Upload]:
    made = [Upload(budget) for _ in range(count)]
    for upload in made:
        nursery.start_soon(upload.run)
    return made


async def test_what_is_announced_does_not_count(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    budget = BodyBudget(LIMIT)
    for upload in uploads(nursery, budget, 50):
        await upload.send(1)
    assert budget.held == 50
    nursery.cancel_scope.cancel()


async def test_the_body_with_the_least_progress_lately_makes_room(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    budget = BodyBudget(LIMIT)
    early, steady = uploads(nursery, budget, 2)
    await early.send(600)
    await trio.sleep(30)
    await steady.send(300)
    await steady.send(200)
    assert early.refused is not None
    assert early.refused.gave_way
    assert steady.refused is None
    assert budget.held == steady.body.held_bytes == 500
    nursery.cancel_scope.cancel()


async def test_a_body_that_is_too_small_to_help_stays(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    budget = BodyBudget(LIMIT)
    small, large, third = uploads(nursery, budget, 3)
    await small.send(10)
    await trio.sleep(30)
    await large.send(900)
    await trio.sleep(1)
    await third.send(800)
    assert (small.refused, third.refused) == (None, None)
    assert large.refused is not None
    assert budget.held == 810
    nursery.cancel_scope.cancel()


async def test_a_body_that_has_arrived_is_never_given_up(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    budget = BodyBudget(LIMIT)
    complete, late = uploads(nursery, budget, 2)
    await complete.send(700, more=False)
    await trio.sleep(30)
    await late.send(300)
    await late.send(300)
    assert complete.got == bytes(700)
    assert late.refused is not None
    assert late.refused.gave_way
    assert budget.held == 700
    whole = RequestBody({b"content-length": b"301"}, late.body.receive, budget, LIMIT)
    with pytest.raises(ServerBusy) as busy:
        whole.accept(bytes(301))
    assert not busy.value.gave_way
    nursery.cancel_scope.cancel()


async def test_a_body_that_has_arrived_at_once_gets_the_room_of_those_that_have_not(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    budget = BodyBudget(LIMIT)
    slow = uploads(nursery, budget, 2)
    for upload in slow:
        await upload.send(400)
    await trio.sleep(1)
    whole = RequestBody({b"content-length": b"900"}, slow[0].body.receive, budget, LIMIT)
    whole.admit()
    whole.accept(bytes(900))
    await wait_all_tasks_blocked()
    assert all(upload.refused is not None for upload in slow)
    assert budget.held == 900
    whole.release()
    assert budget.held == 0
    nursery.cancel_scope.cancel()


async def test_a_body_that_gave_way_is_refused_although_its_end_was_on_its_way(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    budget = BodyBudget(LIMIT)
    (upload,) = uploads(nursery, budget, 1)
    await upload.send(500)
    upload._send.send_nowait({"type": "http.request", "body": b"x", "more_body": False})
    upload.body.give_way(ServerBusy(LIMIT, gave_way=True))
    await wait_all_tasks_blocked()
    assert upload.got is None
    assert upload.refused is not None
    assert budget.held == 0
    nursery.cancel_scope.cancel()
