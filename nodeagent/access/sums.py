"""What each API key has used, kept in a file: the sums and the tokens of the day last over restarts of the agent."""

import logging
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from msgspec.structs import asdict

from nodeagent.access.limits import Sums
from nodeagent.config import ApiKeyConfig

logger = logging.getLogger(__name__)

_MAX_BYTES: Final = 4 * 2**20
Count = Annotated[int, msgspec.Meta(ge=0)]


class _Entry(msgspec.Struct):
    requests: Count = 0
    prompt_tokens: Count = 0
    generated_tokens: Count = 0
    day: str = ""
    tokens_of_day: Count = 0


def sums_file(state_dir: Path) -> Path:
    """Where they are."""
    return state_dir / "api_key_sums.json"


def read_sums(file: Path) -> dict[str, Sums]:
    """The sums by name of key. A file that can't be read is a warning, and they begin anew."""
    try:
        with file.open("rb") as opened:
            entries = msgspec.json.decode(opened.read(_MAX_BYTES), type=dict[str, _Entry])
    except FileNotFoundError:
        return {}
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        logger.warning("%s can't be read, so the sums of API keys begin anew: %s", file, error)
        return {}
    return {name: Sums(**msgspec.structs.asdict(entry)) for name, entry in entries.items()}


def account_json(entry: ApiKeyConfig, sums: Sums) -> dict[str, Any]:
    """A key without its secret: what it may do, and what it has used."""
    shown = entry.model_dump(mode="json", exclude={"sha256", "file", "env", "credential"})
    return {**shown, "used": asdict(sums)}


def encode_sums(sums: dict[str, Sums]) -> bytes:
    """The file's content."""
    return msgspec.json.format(msgspec.json.encode(sums), indent=1)
