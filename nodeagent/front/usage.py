"""How many tokens an answer took, by what llama-server says in it. Pure.

Its own format and OpenAI's chat have `timings` at the end; Anthropic's and OpenAI's others have `usage` only, which
stands at the beginning for embeddings and reranking, and for Anthropic's streams in parts at both. No answer is parsed
as a whole: inside a string of JSON the quotes around these names would have backslashes.
"""

import re
from typing import Annotated, Final

import msgspec

# How much of an answer is looked at, from its beginning and from its end.
HEAD_BYTES: Final = 1024
TAIL_BYTES: Final = 4096

_NAMES: Final = b"prompt_tokens|completion_tokens|input_tokens|output_tokens|cached_tokens|cache_read_input_tokens"
# What all of them have, and where it is in the longest at most.
_COMMON: Final = b"_tokens"
_LONGEST: Final = len(b'"cache_read_input')
_Count = Annotated[int, msgspec.Meta(ge=0, le=10**15)]
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


class _Timings(msgspec.Struct):
    """llama-server's, as far as they are used. They hold no other object."""

    cache_n: _Count = 0
    prompt_n: _Count = 0
    predicted_n: _Count = 0
    predicted_per_token_ms: Annotated[float, msgspec.Meta(ge=0)] | None = None


_OBJECT: Final = msgspec.json.Decoder(_Timings)


def usage_of(head: bytes, tail: bytes) -> Usage:
    """The usage that an answer with this beginning and this end tells; zeros where it tells none."""
    # Most answers have timings, and the rest of these need not be searched.
    timings = _timings(tail)
    if timings is not None:
        per_token_ms = timings.predicted_per_token_ms
        per_token_s = None if per_token_ms is None else per_token_ms / 1000
        return Usage(timings.prompt_n, timings.cache_n, timings.predicted_n, per_token_s)
    found = {**_numbers(head), **_numbers(tail)}
    generated = int(found.get(b"completion_tokens", found.get(b"output_tokens", 0)))
    prompt = int(found.get(b"prompt_tokens", found.get(b"input_tokens", 0)))
    if b"cache_read_input_tokens" in found:  # Anthropic's input_tokens are without them
        return Usage(prompt, int(found[b"cache_read_input_tokens"]), generated)
    cached = min(prompt, int(found.get(b"cached_tokens", 0)))
    return Usage(prompt - cached, cached, generated)


def _timings(tail: bytes) -> _Timings | None:
    """The last timings there, None if there are none that can be read."""
    start = tail.rfind(_TIMINGS)
    if start < 0:
        return None
    try:
        return _OBJECT.decode(tail[start + len(_TIMINGS) - 1 : tail.find(b"}", start) + 1])
    except msgspec.DecodeError:
        return None


def _numbers(text: bytes) -> dict[bytes, float]:
    """The last number with each name. A quote inside of a string has a backslash before it."""
    # To search for fixed bytes is a hundred times as fast as the pattern, and most of an answer has none of the names.
    first = text.find(_COMMON)
    if first < 0:
        return {}
    return {
        found[1]: float(found[2])
        for found in _NUMBER.finditer(text, max(0, first - _LONGEST))
        if not found.start() or text[found.start() - 1] != _BACKSLASH
    }
