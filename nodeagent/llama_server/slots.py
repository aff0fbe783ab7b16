"""llama-server's slots: their cache (KV) written to a file and read back.

`POST /slots/{id}?action=save|restore {"filename": ...}`, in the folder that `--slot-save-path` names; the answers carry
`n_saved`, `n_written` (bytes) and `n_restored`. Tried on builds b10068 and b10434.
"""

from typing import Any

import httpx

from nodeagent.errors import UpstreamLost
from nodeagent.llama_server.control import control_client
from nodeagent.llama_server.relay import Upstream

# Writing takes 11 ms for 35 MB (1,500 tokens of a small model); this is for a disk that hangs.
_TIMEOUT_S = 10.0


async def save_slot(upstream: Upstream, slot: int, filename: str) -> tuple[int, int]:
    """Write the slot's cache; return its tokens and the file's size in bytes. Raises UpstreamLost."""
    said = await _act(upstream, slot, "save", filename)
    return int(said.get("n_saved", 0)), int(said.get("n_written", 0))


async def restore_slot(upstream: Upstream, slot: int, filename: str) -> int:
    """Read a cache back into the slot; return its tokens. Raises UpstreamLost.

    The server aborts on a file that was cut off, and takes one of another model of the same shape without a word:
    give it only what this very model wrote, whole.
    """
    return int((await _act(upstream, slot, "restore", filename)).get("n_restored", 0))


async def _act(upstream: Upstream, slot: int, action: str, filename: str) -> dict[str, Any]:
    try:
        async with control_client(upstream.api_key, _TIMEOUT_S) as http:
            url = f"http://{upstream.address}/slots/{slot}"
            answer = await http.post(url, params={"action": action}, json={"filename": filename})
        said = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise UpstreamLost(upstream.address, f"{action} of slot {slot}: {error!r}") from error
    if answer.status_code != 200 or not isinstance(said, dict):
        raise UpstreamLost(upstream.address, f"{action} of slot {slot}: {answer.status_code} {answer.text[:200]}")
    return said
