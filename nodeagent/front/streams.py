"""Answers of the node's own that go on as something happens: events, logs, activity."""

from collections.abc import AsyncIterator

from quart import Response, request

from nodeagent.front.answer import STREAM_HEADERS
from nodeagent.front.header_text import as_text


def follows() -> bool:
    """Whether the request asks for what comes later too (`?follow=true`)."""
    return request.args.get("follow", "") in ("true", "1", "yes")


def stream_response(source: AsyncIterator[bytes], content_type: str) -> Response:
    """The response whose body comes piece by piece; it ends with its source, or when the client leaves."""
    return Response(source, content_type=content_type, headers=dict(as_text(STREAM_HEADERS)))
