"""The bytes of a connection, on real sockets."""

import pytest
import trio
from trio.testing import open_stream_to_socket_listener

from nodeagent.front.transport import Transport


async def test_nothing_arrives_on_a_socket_that_was_closed_meanwhile() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(5):
        async with listener:
            for end in (Transport.reset, Transport.close):
                async with await open_stream_to_socket_listener(listener):
                    transport = Transport(await listener.accept(), None, 1.0)
                    end(transport)
                    assert [await transport.receive() for _ in range(2)] == [None, None]


async def test_what_the_socket_does_not_take_waits_and_is_flushed_in_order() -> None:
    sent = bytes(range(256)) * 2**15
    received = b""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(20):
        async with listener, await open_stream_to_socket_listener(listener) as client:
            transport = Transport(await listener.accept(), None, 10.0)
            for start in range(0, len(sent), 2**20):
                transport.put(sent[start : start + 2**20])
            assert 0 < transport.unsent_bytes < len(sent)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(transport.flush)
                while len(received) < len(sent):
                    received += await client.receive_some(2**20)
            assert transport.unsent_bytes == 0
            transport.close()
            assert await client.receive_some() == b""
    assert received == sent


async def test_a_client_that_reads_nothing_in_time_is_too_slow() -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    with trio.fail_after(20):
        async with listener, await open_stream_to_socket_listener(listener):
            transport = Transport(await listener.accept(), None, 0.1)
            transport.put(bytes(2**25))
            with pytest.raises(trio.TooSlowError):
                await transport.flush()
            transport.reset()
