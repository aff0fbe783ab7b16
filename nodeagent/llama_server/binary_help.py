"""Asks a llama-server binary for its `--help`, which takes about 10 ms."""

import functools
import logging
import subprocess
from pathlib import Path

from nodeagent.config import Dialect, parse_dialect

logger = logging.getLogger(__name__)

_TIMEOUT_S = 10.0
_MAX_CHARS = 2**20


def read_help(binary: Path) -> str:
    """The help text, "" if the binary gives none. Blocks for up to 10 s."""
    try:
        done = subprocess.run(
            [binary, "--help"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("%s --help failed: %s", binary, error)
        return ""
    return done.stdout[:_MAX_CHARS]


def dialect_of(binary: str) -> Dialect:
    """The dialect of a binary, which is asked once as long as it does not change. Blocks as `read_help` does."""
    try:
        changed_ns = Path(binary).stat().st_mtime_ns
    except OSError:
        return Dialect()
    return _dialect_of(binary, changed_ns)


@functools.lru_cache(maxsize=16)
def _dialect_of(binary: str, _changed_ns: int) -> Dialect:
    return parse_dialect(read_help(Path(binary)))
