"""One sentence for each thing that is wrong with a value: pydantic's errors in words for people.

The patterns of names are here too, beside their descriptions."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, Final

from nodeagent.config.server_flags import find_flag

_EXPECTED = {
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping of keys to values",
    "model_type": "must be a mapping of keys to values",
    "too_short": "must not be empty",
}

# Ids go into URLs, log lines and metric labels, and llama-server splits its `-a` at commas.
MODEL_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._:@/+-]{0,199}$"
# A node's id is also the name of a folder.
NODE_ID: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$"
DEVICE_ID: Final = r"^(cpu|gpu|cuda|rocm|sycl|vulkan|metal):(0|[1-9][0-9]{0,2})$"

KEY_NAME: Final = r"^[A-Za-z0-9][A-Za-z0-9._@-]{0,63}$"
SHA256: Final = "^[0-9a-f]{64}$"
VARIABLE: Final = "^[A-Za-z_][A-Za-z0-9_]{0,127}$"

_PATTERNS = {
    KEY_NAME: "a name of letters, digits and . _ @ - that starts with a letter or digit (at most 64)",
    SHA256: "64 hexadecimal digits in lower case",
    VARIABLE: "the name of an environment variable",
    MODEL_NAME: "a name of letters, digits and . _ : @ / + - that starts with a letter or digit (at most 200)",
    NODE_ID: "a name of letters, digits and . _ - that starts with a letter or digit (at most 128)",
    DEVICE_ID: "cpu:0, cpu:1, ... or gpu:0, gpu:1, ... (or of one backend: cuda:0, rocm:0, sycl:0, vulkan:0, metal:0)",
}


def shown(value: object) -> str:
    """A value for a message: short, on one line, and as YAML would write it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null (nothing after the colon)"
    if isinstance(value, Mapping):
        return "a mapping"
    text = repr(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def explain(error: Mapping[str, Any], known_keys: Iterable[str]) -> str:
    """One of pydantic's error records (`ValidationError.errors()`) as a sentence.

    `known_keys` are the keys allowed at the place of the error, for a hint at a misspelt one.
    """
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "missing":
        return "is missing and has no default"
    if kind == "extra_forbidden":
        return _unknown_key(str(error["loc"][-1]), known_keys)
    if kind == "value_error":
        return str(context["error"])
    return f"{_expectation(kind, context) or error['msg']}, found {shown(value)}{_hint(kind, value)}"


def _expectation(kind: str, context: Mapping[str, Any]) -> str | None:
    match kind:
        case "greater_than":
            return f"must be more than {context['gt']:g}"
        case "greater_than_equal":
            return f"must be at least {context['ge']:g}"
        case "less_than_equal":
            return f"must be at most {context['le']:.17g}"
        case "literal_error":
            return f"must be {context['expected']}"
        case "string_pattern_mismatch":
            return f"must be {_PATTERNS[context['pattern']]}"
        case _:
            return _EXPECTED.get(kind)


def _hint(kind: str, value: object) -> str:
    if value is None:
        return "; remove the key to get its default"
    if kind == "string_type" and isinstance(value, int | float):
        return "; put it in quotes"
    if kind in ("int_type", "float_type") and isinstance(value, str) and value.strip().lstrip("+-").isdecimal():
        return "; remove the quotes"
    return ""


def _unknown_key(key: str, known_keys: Iterable[str]) -> str:
    close = difflib.get_close_matches(key, list(known_keys), n=1)
    if close:
        return f"is not a known key; did you mean {close[0]}?"
    if find_flag(key) is not None:
        return "is not a known key; put flags of llama-server under server_args"
    return "is not a known key"
