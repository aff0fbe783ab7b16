"""A model's own parameters in the body of a request: `defaults` where the request names none, `overrides` always. Pure.

Nothing is parsed: of fields with the same name llama-server takes the last one, so defaults are put before a body's
fields and overrides after them. A body of a model without either stays as it is.
"""

from collections.abc import Mapping
from typing import Any

import msgspec


class Parameters(msgspec.Struct, frozen=True):
    """The fields as they are put into a JSON object: `"name":value`, each followed (`head`) or preceded (`tail`) by a
    comma."""

    head: bytes = b""
    tail: bytes = b""

    @classmethod
    def of(cls, defaults: Mapping[str, Any], overrides: Mapping[str, Any]) -> "Parameters | None":
        """The parameters of a model, None if it has none."""
        if not defaults and not overrides:
            return None
        head = b"".join(b"%s," % field for field in _fields(defaults))
        return cls(head, b"".join(b",%s" % field for field in _fields(overrides)))

    def put_into(self, body: bytes) -> bytes:
        """The body with them. It must be a JSON object with at least one field, which the node has checked."""
        start = body.index(b"{") + 1
        end = body.rindex(b"}")
        return b"".join((body[:start], self.head, body[start:end], self.tail, body[end:]))


def _fields(values: Mapping[str, Any]) -> list[bytes]:
    return [b"%s:%s" % (msgspec.json.encode(name), msgspec.json.encode(value)) for name, value in values.items()]
