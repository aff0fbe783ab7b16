"""What a server answers instead of what was asked for: its error, in the shape of the request's path.

Most errors are passed on as they are. Translated are those of Anthropic's and Ollama's paths, where llama-server
answers in OpenAI's shape, those of streams whose head has been sent, and those where it answers 500 although the
request is wrong, and those without a word (to a form that its parser does not take, say).
"""

import json
from typing import Any, Final

from nodeagent.front.answer import AnswerBody
from nodeagent.front.endpoints import Dialect
from nodeagent.front.error_shapes import as_event, error_json
from nodeagent.front.exchange import AbortResponse
from nodeagent.front.first_bytes import InferenceRequest
from nodeagent.llama_server.relay import UpstreamResponse

_MAX_BYTES: Final = 2**16
# Of an answer that is no error in JSON.
_SHOWN_CHARS: Final = 500
# What llama-server says where it answers 500 to what is wrong with the request: a bad text to embed, one that is longer
# than the batch, an image for a model that takes none, a value of a wrong type, a token that the model does not have,
# tools or messages that are none, two grammars, a format of reasoning that it does not know.
_CLIENTS_FAULTS: Final = (
    '"prompt" ',
    "is too large to process",
    "input is not supported",
    "[json.exception.type_error",
    "vector::_M_range_check",
    "Failed to parse tools: ",
    "Failed to parse messages: ",
    "Cannot use both json_schema and grammar",
    "Unknown reasoning format: ",
)


class ServerError:
    """One such answer. What changes: `_content`, in `read`, which may be cancelled and called again."""

    def __init__(self, status: int, request: InferenceRequest) -> None:
        self.server_status = status
        self._request = request
        self._content = b""

    async def read(self, body: AnswerBody) -> None:
        """Read all of it, or as much as there is before the server is lost."""
        try:
            while not body.at_end and len(self._content) < _MAX_BYTES:
                self._content += await body.read()
        except AbortResponse:
            return  # what has arrived has to do; `body` has logged the loss

    def translated(self) -> tuple[int, bytes]:
        """Its status and its body, for the client."""
        error = self._error()
        status = self.server_status
        if status == 500 and any(fault in str(error.get("message")) for fault in _CLIENTS_FAULTS):
            status = 400
            error |= {"type": "invalid_request_error", "code": 400}
        return status, error_json(self._request.dialect, status, error, self._request.request_id)

    def event(self) -> bytes:
        """The same as an event."""
        return as_event(self._request.dialect, self.translated()[1])

    def _error(self) -> dict[str, Any]:
        try:
            error = json.loads(self._content)["error"]
        except (ValueError, KeyError, TypeError):
            error = None
        if isinstance(error, dict):
            return error
        text = self._content[:_SHOWN_CHARS].decode(errors="replace") or "nothing"
        instead = " instead of a stream" if self._request.ping_s else ""
        message = f"The server answered with status {self.server_status}{instead}: {text}"
        kind = "invalid_request_error" if 400 <= self.server_status < 500 else "server_error"
        return {"message": message, "type": kind, "param": None, "code": None}


def needs_translation(request: InferenceRequest, response: UpstreamResponse) -> bool:
    """Whether this answer is an error that the client should get in another form."""
    if response.status < 400:
        return False
    return response.status == 500 or request.dialect is not Dialect.OPENAI or not response.first_bytes
