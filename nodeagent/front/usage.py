"""How many tokens an answer took, by what llama-server says in it. Pure.

Its own format and OpenAI's chat have `timings` at the end; Anthropic's and OpenAI's others have `usage` only, which
stands at the beginning for embeddings and reranking, and for Anthropic's streams in parts at both. Nothing is parsed:
inside a string of JSON the quotes around these names would have backslashes.
"""

import re
from typing import Final

import msgspec

# How much of an answer is looked at, from its beginning and from its end.
HEAD_BYTES: Final = 1024
TAIL_BYTES: Final = 4096

_NAMES: Final = (
    b"cache_n|prompt_n|predicted_n|predicted_per_token_ms|"
    b"prompt_tokens|completion_tokens|input_tokens|output_tokens|cached_tokens|cache_read_input_tokens"
)
_TIMINGS: Final = b'"timings":{'
_BACKSLASH: Final = ord("\\")
_NUMBER: Final = re.compile(rb'"(' + _NAMES + rb')": ?([0-9]{1,15}(?:\.[0-9]{1,20})?)(?![0-9.])')


class Usage(msgspec.Struct, frozen=True):
    """Tokens: those of the prompt that were processed, those that were cached, and the generated ones. `per_token_s` is
    how long a generated one took, None if unknown."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    per_token_s: float | None = None


def usage_of(head: bytes, tail: bytes) -> Usage:
    """The usage that an answer with this beginning and this end tells; zeros where it tells none."""
    timings = tail.rfind(_TIMINGS)
    # Most answers have them, and the rest of these need not be searched.
    found = _numbers(tail[timings:]) if timings >= 0 else {**_numbers(head), **_numbers(tail)}
    per_token_ms = found.get(b"predicted_per_token_ms")
    if b"prompt_n" in found or b"predicted_n" in found:
        return Usage(
            int(found.get(b"prompt_n", 0)),
            int(found.get(b"cache_n", 0)),
            int(found.get(b"predicted_n", 0)),
            None if per_token_ms is None else per_token_ms / 1000,
        )
    generated = int(found.get(b"completion_tokens", found.get(b"output_tokens", 0)))
    prompt = int(found.get(b"prompt_tokens", found.get(b"input_tokens", 0)))
    if b"cache_read_input_tokens" in found:  # Anthropic's input_tokens are without them
        return Usage(prompt, int(found[b"cache_read_input_tokens"]), generated)
    cached = min(prompt, int(found.get(b"cached_tokens", 0)))
    return Usage(prompt - cached, cached, generated)


def _numbers(text: bytes) -> dict[bytes, float]:
    """The last number with each name. A quote inside of a string has a backslash before it."""
    return {
        found[1]: float(found[2])
        for found in _NUMBER.finditer(text)
        if not found.start() or text[found.start() - 1] != _BACKSLASH
    }
