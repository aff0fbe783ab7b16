"""Streams that take hours, in virtual time: the front with its default time-outs, a real relay, the watch for stalls.

Only the sockets have no addresses.
"""

import pytest
import trio
from trio.testing import MockClock

from fakes.one_model_node import OneModelNode, chat
from fakes.pair_serving import EventServer, PairServers, PairUpstream, start_pair_serving, watch_for_stalls

HOUR_S = 3600.0


@pytest.mark.parametrize("road", ["fast", "ordinary"])
@pytest.mark.parametrize(
    ("every_s", "stall_timeout_s"), [(5.0, 120.0), (600.0, HOUR_S)], ids=["steady", "with long silences"]
)
async def test_no_time_out_ends_a_stream_that_goes_on_for_hours(
    road: str, every_s: float, stall_timeout_s: float, nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    events = int(2 * HOUR_S / every_s)
    upstream = PairUpstream(nursery, EventServer(events, every_s))
    node = OneModelNode(PairServers(nursery, upstream), road=road)
    await node.start(nursery)
    stalls = watch_for_stalls(nursery, upstream, stall_timeout_s)
    listener = await start_pair_serving(nursery, node)
    began = trio.current_time()
    async with listener.connect() as client:
        await client.send(chat())
        answer = await client.rest()
    assert answer.startswith(b"HTTP/1.1 200")
    assert answer.count(b"data: ") == events + 1
    assert answer.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    assert trio.current_time() - began == pytest.approx(2 * HOUR_S)
    assert stalls == []
    assert node.held() == (0, 0, 0)
    upstream.close()
    nursery.cancel_scope.cancel()
