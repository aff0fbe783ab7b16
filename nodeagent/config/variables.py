"""References to environment variables in the text of a configuration: `${NAME}` and `${NAME:-default}`. Pure.

`$${` stands for a literal `${`.
"""

import re
from collections.abc import Mapping

_REFERENCE = re.compile(r"(?P<escaped>\$\$\{)|\$\{(?P<body>[^}]*)(?P<end>\}?)")
_BODY = re.compile(r"(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>.*))?", re.DOTALL)


def expand(text: str, environ: Mapping[str, str]) -> str:
    """The text with its references replaced. Raises ValueError with a message that names the variable."""

    def value_of(found: re.Match[str]) -> str:
        if found["escaped"]:
            return "${"
        body = _BODY.fullmatch(found["body"]) if found["end"] else None
        if body is None:
            raise ValueError(
                f"must refer to a variable like ${{NAME}} or ${{NAME:-default}}, found {found[0]!r}; "
                "write $${ for a literal ${"
            )
        value = environ.get(body["name"], body["default"])
        if value is None:
            raise ValueError(f"refers to the environment variable {body['name']}, which is not set")
        return value

    return _REFERENCE.sub(value_of, text)
