"""A look at what servers answer on one path, at most once in a while."""

from typing import Final
from weakref import WeakKeyDictionary

import trio

from nodeagent.errors import BackendUnavailable, UpstreamLost
from nodeagent.llama_server.relay import Upstream

# A server that is asked for its slots more often than once a second does not notice that a client has left a request
# that is not streamed.
_GOOD_S: Final = 2.0
_TIMEOUT_S: Final = 5.0
_RETRY_S: Final = 1.0


class Window:
    """What servers answer on one path; they are asked at most once each `_GOOD_S`.

    What changes: `_seen` (the last answer of each server, and until when it is good) and `_asking`, in `look`.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._seen = WeakKeyDictionary[Upstream, tuple[float, tuple[int, bytes]]]()
        self._asking = trio.Lock()

    async def look(self, model_id: str, server: Upstream) -> tuple[int, bytes]:
        """The status and body that the server answers, or has just answered. Raises BackendUnavailable."""
        async with self._asking:
            good_until, seen = self._seen.get(server, (0.0, (0, b"")))
            if trio.current_time() < good_until:
                return seen
            seen = await ask(model_id, server, "GET", self._path)
            self._seen[server] = trio.current_time() + _GOOD_S, seen
            return seen


def no_answer(model_id: str, path: str) -> BackendUnavailable:
    """The refusal where a model's server does not answer on that path."""
    return BackendUnavailable(model_id, f"its server does not answer {path}", _RETRY_S)


async def ask(model_id: str, server: Upstream, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """The status and body that a model's server answers to a short request, which needs none of its slots. Raises
    BackendUnavailable."""
    sent = server.request(method, path, [(b"content-type", b"application/json")] if body else [], body)
    try:
        with trio.fail_after(_TIMEOUT_S):
            response = await sent.response()
            content = b""
            while (chunk := await response.next_chunk()) is not None:
                content += chunk
            return response.status, content
    except (UpstreamLost, trio.TooSlowError) as error:
        raise no_answer(model_id, path) from error
    finally:
        sent.close()
