"""Asks a llama-server binary for its `--help`, which takes about 10 ms."""

import logging
import subprocess
from pathlib import Path

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
