"""`api_keys`: who may use the node, and how much. The keys themselves are never in the configuration, only where they
are, or their SHA-256.

Those that `rolemesh-node-agent keys` makes are in a file of the same entries in the state folder (`key_file`).
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal, Self, get_args

from pydantic import Field, model_validator

from nodeagent.config.base import Keys
from nodeagent.config.problems import KEY_NAME, NODE_ID, SHA256, VARIABLE
from nodeagent.config.values import AbsolutePath, AsTuple
from nodeagent.errors import Problem

Role = Literal["inference", "metrics", "admin"]
PriorityName = Literal["interactive", "normal", "batch"]

ROLES: Final[tuple[Role, ...]] = get_args(Role)
PRIORITIES: Final[tuple[PriorityName, ...]] = get_args(PriorityName)

# Short ones can be guessed.
_SHORTEST_KEY: Final = 16
_LONGEST_KEY: Final = 512
_SOURCES: Final = ("sha256", "file", "env", "credential")


class ApiKeyConfig(Keys):
    """One entry of `api_keys`. Exactly one of `sha256`, `file`, `env` and `credential` says what the key is."""

    name: str = Field(pattern=KEY_NAME, description="Name of who uses the key, for logs, activity and sums.")
    sha256: str | None = Field(
        default=None,
        pattern=SHA256,
        description="The SHA-256 of the key in hexadecimal, as `printf %s KEY | sha256sum` prints it.",
    )
    file: AbsolutePath | None = Field(default=None, description="File with the key in one line.")
    env: str | None = Field(
        default=None,
        pattern=VARIABLE,
        description="Environment variable of the agent with the key; its servers don't inherit it.",
    )
    credential: str | None = Field(
        default=None,
        pattern=NODE_ID,
        description="Name of a systemd credential (`LoadCredential=`) with the key.",
    )
    roles: Annotated[tuple[Role, ...], AsTuple] = Field(
        default=("inference",),
        min_length=1,
        description="What the key is for: inference; metrics (`/metrics`, the inventory and the queue); admin "
        "(everything).",
    )
    models: Annotated[tuple[str, ...], AsTuple] | None = Field(
        default=None, min_length=1, description="Models that the key may use, by `model_id`; all by default."
    )
    priority: PriorityName = Field(
        default="interactive",
        description="Highest priority of its requests; a higher one in `X-Priority` counts as this one.",
    )
    requests_per_minute: int | None = Field(
        default=None, ge=1, le=1_000_000, description="Requests for inference in a minute; no limit by default."
    )
    concurrent_requests: int | None = Field(
        default=None, ge=1, le=100_000, description="Requests for inference at the same time; no limit by default."
    )
    tokens_per_day: int | None = Field(
        default=None,
        ge=1,
        le=10**15,
        description="Tokens, of prompts and answers together, in a day of UTC; no limit by default. A request that has "
        "begun is not cut off.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [source for source in _SOURCES if getattr(self, source) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"must have exactly one of sha256, file, env and credential, found {found}")
        return self


def digest_of(key: str | bytes) -> str:
    """The SHA-256 of a key, in hexadecimal. Keys are long and random, so nothing slower is needed."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape") if isinstance(key, str) else key).hexdigest()


def read_digest(entry: ApiKeyConfig) -> str:
    """The SHA-256 of the key that the entry names. Raises ValueError with what is wrong; blocks on the disk."""
    if entry.sha256 is not None:
        return entry.sha256
    if entry.env is not None:
        text, place = os.environ.get(entry.env), f"the environment variable {entry.env}"
        if text is None:
            raise ValueError(f"{place} is not set")
    else:
        file = entry.file or _credential(entry.credential or "")
        place = str(file)
        try:
            with file.open(encoding="ascii") as opened:
                text = opened.read(_LONGEST_KEY + 3)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"can't be read: {error}") from error
    key = text.strip()
    if not (_SHORTEST_KEY <= len(key) <= _LONGEST_KEY and key.isascii() and key.isprintable() and " " not in key):
        raise ValueError(
            f"{place} must hold a key of {_SHORTEST_KEY} to {_LONGEST_KEY} ASCII characters without spaces"
        )
    return digest_of(key)


def _credential(name: str) -> Path:
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise ValueError(f"there is no credential {name!r}: systemd gave this process none (LoadCredential=)")
    return Path(folder, name)


def read_digests(
    entries: tuple[ApiKeyConfig, ...], problem: Callable[[tuple[str | int, ...], str], Problem]
) -> tuple[dict[str, ApiKeyConfig], list[Problem]]:
    """The entries by the SHA-256 of their keys, and what is wrong with the others."""
    found: dict[str, ApiKeyConfig] = {}
    problems = []
    for index, entry in enumerate(entries):
        source = next(source for source in _SOURCES if getattr(entry, source) is not None)
        path = ("api_keys", index, source)
        try:
            digest = read_digest(entry)
        except ValueError as error:
            problems.append(problem(path, str(error)))
            continue
        if digest in found:
            problems.append(problem(path, f"is the same key as that of {found[digest].name!r}; give each its own"))
        found.setdefault(digest, entry)
    return found, problems
