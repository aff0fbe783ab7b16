"""Clients that read slowly or not at all, in virtual time: what they hold, when they are cut, whom they delay."""

from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock

from fakes.one_model_node import OneModelNode, chat
from fakes.pair_serving import EventServer, PairServers, PairUpstream, start_pair_serving, watch_for_stalls
from fakes.serving import Peer

EVENT_BYTES = 8192
SEND_TIMEOUT_S = 60.0
# What the two sockets on its way hold of an answer, and what the front does.
HELD_MAX_BYTES = 2**20


async def read_nothing(client: Peer) -> None:
    await trio.sleep_forever()


async def read_a_little(client: Peer) -> None:
    while True:
        await trio.sleep(10)
        await client.stream.receive_some(1024)


async def test_many_that_do_not_read_are_cut_hold_little_and_delay_no_other(
    nursery: trio.Nursery, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    slow, quick = 50, 10
    server = EventServer(200, 1.0, event_bytes=EVENT_BYTES)
    upstream = PairUpstream(nursery, server)
    node = OneModelNode(PairServers(nursery, upstream), max_pending=slow + quick)
    node.servers.fake.slots = slow + quick
    await node.start(nursery)
    listener = await start_pair_serving(nursery, node, send_timeout_s=SEND_TIMEOUT_S)

    async def be_slow(number: int) -> None:
        async with listener.connect() as client:
            await client.send(chat())
            await (read_a_little if number % 2 else read_nothing)(client)

    async def be_quick(arrivals: list[float]) -> None:
        async with listener.connect() as client:
            await client.send(chat())
            for _ in range(200):
                await client.until(b"data: ")
                arrivals.append(trio.current_time())
            assert (await client.rest()).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")

    arrivals: list[list[float]] = [[] for _ in range(quick)]
    async with trio.open_nursery() as quick_ones, trio.open_nursery() as slow_ones:
        for number in range(slow):
            slow_ones.start_soon(be_slow, number, name="slow client")
        for times in arrivals:
            quick_ones.start_soon(be_quick, times, name="quick client")
        await trio.sleep(SEND_TIMEOUT_S - 1)
        assert node.scheduler.admitted == server.serving == slow + quick
        to_slow = server.sent_bytes - sum(map(len, arrivals)) * EVENT_BYTES
        assert to_slow < slow * HELD_MAX_BYTES
        await trio.sleep(2 * SEND_TIMEOUT_S)
        assert node.scheduler.admitted == server.serving == quick, "the servers' slots are free"
        cut = [record for record in caplog.records if "client read too little for 60 s" in record.getMessage()]
        assert len(cut) == slow
        slow_ones.cancel_scope.cancel()
    for times in arrivals:
        gaps = [later - earlier for earlier, later in pairwise(times)]
        assert gaps == pytest.approx([1.0] * 199)
    assert node.held() == (0, 0, 0)
    upstream.close()
    nursery.cancel_scope.cancel()


async def test_a_server_is_not_taken_for_stalled_while_its_only_client_does_not_read(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    server = EventServer(500, 0.0, event_bytes=EVENT_BYTES)
    upstream = PairUpstream(nursery, server)
    node = OneModelNode(PairServers(nursery, upstream))
    await node.start(nursery)
    stalls = watch_for_stalls(nursery, upstream, stall_timeout_s=20)
    listener = await start_pair_serving(nursery, node, send_timeout_s=SEND_TIMEOUT_S)
    async with listener.connect() as client:
        await client.send(chat())
        await trio.sleep(SEND_TIMEOUT_S - 10)
        assert server.serving == 1, "it has more to say than fits on the way"
        answer = await client.rest()
    assert answer.count(b"data: ") == 501
    assert stalls == []
    upstream.close()
    nursery.cancel_scope.cancel()
