"""Which conversation a request belongs to: by an id that the client sends, or by how the conversation begins."""

import hashlib
import json
from typing import Any


def conversation_of(session: str | None, body: dict[str, Any]) -> str | None:
    """A key that stays the same from turn to turn, None if nothing identifies the conversation.

    `session` is the header `X-Session-Id`. Without it the body's `prompt_cache_key` counts (OpenAI's field for this),
    then the messages up to the user's first one, which every later turn repeats.
    """
    if session:
        return f"session {session[:256]}"
    key = body.get("prompt_cache_key")
    if isinstance(key, str) and key:
        return f"key {key[:256]}"
    messages = body.get("messages")
    head = _head(messages) if isinstance(messages, list) else []
    if not head:
        return None
    return "head " + hashlib.blake2b(json.dumps(head).encode(), digest_size=16).hexdigest()


def _head(messages: list[Any]) -> list[Any]:
    for index, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") == "user":
            return messages[: index + 1]
    return []
