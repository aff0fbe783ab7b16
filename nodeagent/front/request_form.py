"""Reads the model's name from a multipart form, such as the upload of a recording. Pure.

The name may come after the file, so all of the body is looked through, in pieces: beside the body itself no more than
`_MEMORY_BYTES` are needed.
"""

from typing import Final

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.http import parse_options_header
from werkzeug.sansio.multipart import Data, Epilogue, Field, File, MultipartDecoder, NeedData

from nodeagent.errors import InvalidRequest
from nodeagent.front.request_body import BodyFields

_PIECE_BYTES: Final = 2**16
_MEMORY_BYTES: Final = 2**18
_MAX_PARTS: Final = 100
_MAX_NAME_BYTES: Final = 1024


def read_form(body: bytes, content_type: str | None, *, needs: str) -> BodyFields:
    """Check and read a form that must have the part `needs`. Raises InvalidRequest."""
    kind, options = parse_options_header(content_type)
    boundary = options.get("boundary", "")
    if kind != "multipart/form-data" or not boundary:
        raise InvalidRequest("The body must be a form: Content-Type multipart/form-data, with its boundary.")
    try:
        names, model = _parts(body, boundary.encode("latin-1"))
    except (ValueError, LookupError, RequestEntityTooLarge) as error:
        raise InvalidRequest(f"The body is not a valid form: {error}", code="invalid_form") from None
    if needs not in names:
        raise InvalidRequest(f"'{needs}' is missing.", param=needs)
    return BodyFields(model=model.decode(errors="replace") or None, stream=False, completions=1, conversation=None)


def _parts(body: bytes, boundary: bytes) -> tuple[set[str], bytes]:
    """The names of the parts, and the content of `model`."""
    decoder = MultipartDecoder(boundary, _MEMORY_BYTES, max_parts=_MAX_PARTS)
    names: set[str] = set()
    name, model = "", b""
    pieces = [*range(0, len(body), _PIECE_BYTES), None]
    for start in pieces:
        decoder.receive_data(None if start is None else body[start : start + _PIECE_BYTES])
        while not isinstance(event := decoder.next_event(), NeedData | Epilogue):
            match event:
                case Field() | File():
                    name = event.name
                    names.add(name)
                case Data() if name == "model":
                    model += event.data
                    if len(model) > _MAX_NAME_BYTES:
                        raise InvalidRequest("'model' must be the id of a model, not a long text.", param="model")
    return names, model
