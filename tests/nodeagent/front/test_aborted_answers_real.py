"""A truncated answer is never mistaken for a complete one, by real sockets and real clients."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import trio
from openai import APIConnectionError, AsyncOpenAI
from quart import Response
from quart_trio import QuartTrio

from fakes.asgi import Receive, Send
from fakes.serving import GET, quart_app, start_serving
from nodeagent.front.server import AbortResponse


def aborting_app() -> QuartTrio:
    app = quart_app()

    async def broken_off() -> AsyncIterator[bytes]:
        yield b'data: {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": []}\n\n'
        raise AbortResponse("the server behind it died")

    @app.get("/stream")
    @app.post("/v1/chat/completions")
    async def stream() -> Response:
        return Response(broken_off(), content_type="text/event-stream")

    return app


async def test_an_aborted_stream_is_never_mistaken_for_a_complete_one(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    with trio.fail_after(10):
        served = await start_serving(nursery, aborting_app())
        async with httpx.AsyncClient() as client:
            with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
                await client.get(f"{served.url}/stream")
        answer = await served.ask(b"GET /stream HTTP/1.1\r\nHost: n\r\n\r\n")
    assert b"data: " in answer
    assert not answer.endswith(b"0\r\n\r\n")
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_openai_clients_see_an_aborted_stream_as_an_error(nursery: trio.Nursery) -> None:
    with trio.fail_after(10):
        served = await start_serving(nursery, aborting_app())
        async with AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(
                model="m", messages=[{"role": "user", "content": "hello"}], stream=True
            )
            assert (await anext(stream)).id == "x"
            with pytest.raises(APIConnectionError):
                await anext(stream)


async def test_an_aborted_stream_resets_the_connection_of_an_http_1_0_client(nursery: trio.Nursery) -> None:
    with trio.fail_after(5):
        served = await start_serving(nursery, aborting_app())
        async with await served.connect() as peer:
            await peer.send(b"GET /stream HTTP/1.0\r\n\r\n")
            with pytest.raises(trio.BrokenResourceError):
                await peer.rest()


async def test_an_application_that_fails_in_mid_answer_truncates_it_and_is_logged(
    nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    async def app(scope: dict[str, Any], receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"first", "more_body": True})
        raise ValueError("a fault of the application")

    with trio.fail_after(5):
        served = await start_serving(nursery, app)
        assert (await served.ask(GET)).endswith(b"5\r\nfirst\r\n")
        [record] = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert "a fault of the application" in caplog.text
    assert record.levelno == logging.ERROR
