"""The file of API keys that `rolemesh-node-agent keys` makes: entries of `api_keys` with `sha256`, in the state folder.

A running agent reads it again when it has changed.
"""

import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pydantic import TypeAdapter, ValidationError

from nodeagent.config.api_keys import ApiKeyConfig
from nodeagent.errors import StartupError
from nodeagent.whole_files import replace_file

_ENTRIES: Final = TypeAdapter(tuple[ApiKeyConfig, ...])
_MAX_BYTES: Final = 4 * 2**20


def key_file(state_dir: Path) -> Path:
    """Where it is."""
    return state_dir / "api_keys.json"


def read_key_file(state_dir: Path) -> tuple[ApiKeyConfig, ...]:
    """Its entries, none if there is no such file. Raises StartupError if it can't be read: keys that are lost unnoticed
    would lock their users out, or let everybody in."""
    file = key_file(state_dir)
    try:
        with file.open("rb") as opened:
            return _ENTRIES.validate_json(opened.read(_MAX_BYTES))
    except FileNotFoundError:
        return ()
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise StartupError(f"{file} is damaged ({place}: {first['msg']}); repair or remove it") from None
    except OSError as error:
        raise StartupError(f"{file} can't be read: {error.strerror}") from error


def write_key_file(state_dir: Path, entries: Sequence[ApiKeyConfig]) -> None:
    """Replace the file; only the agent's own user can read it. Raises StartupError."""
    file = key_file(state_dir)
    content = [entry.model_dump(mode="json", exclude_defaults=True) for entry in entries]
    try:
        # Made by root for an agent of another user, who has to be able to read it.
        replace_file(file, json.dumps(content, indent=1).encode(), private=True, like=state_dir)
    except OSError as error:
        raise StartupError(f"{file} can't be written: {error.strerror}") from error


@contextmanager
def changing(state_dir: Path) -> Iterator[None]:
    """Keep other commands from changing the file at the same time. Raises StartupError."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = os.open(state_dir / "api_keys.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StartupError(f"state_dir {state_dir} can't be used: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
