"""llama-server's slots: their KV cache saved to a file and restored from it.

`POST /slots/{id}?action=save|restore {"filename": ...}`, in the folder of `--slot-save-path`; the responses have
`n_saved`, `n_written` (bytes) and `n_restored`. Tried on builds b10068 and b10434.
"""

from typing import Any

import httpx

from nodeagent.errors import UpstreamLost
from nodeagent.llama_server.control import control_client
from nodeagent.llama_server.relay import Upstream

# Writing 35 MB (1,500 tokens of a small model) takes 11 ms; this is for a disk that hangs.
_TIMEOUT_S = 10.0


async def save_slot(upstream: Upstream, slot: int, filename: str) -> tuple[int, int]:
    """Save the slot's cache; return its tokens and the file's size in bytes. Raises UpstreamLost."""
    result = await _act(upstream, slot, "save", filename)
    return int(result.get("n_saved", 0)), int(result.get("n_written", 0))


async def restore_slot(upstream: Upstream, slot: int, filename: str) -> int:
    """Restore a cache to the slot; return its tokens. Raises UpstreamLost.

    The server aborts on a truncated file, and accepts that of another model with the same shape without an error: give
    it only a complete file that the same model wrote.
    """
    return int((await _act(upstream, slot, "restore", filename)).get("n_restored", 0))


async def _act(upstream: Upstream, slot: int, action: str, filename: str) -> dict[str, Any]:
    try:
        async with control_client(upstream.api_key, _TIMEOUT_S) as http:
            url = f"http://{upstream.address}/slots/{slot}"
            response = await http.post(url, params={"action": action}, json={"filename": filename})
        result = response.json() if response.status_code == 200 else None
    except (httpx.HTTPError, ValueError) as error:
        raise UpstreamLost(upstream.address, f"{action} of slot {slot}: {error!r}") from error
    if not isinstance(result, dict):
        raise UpstreamLost(upstream.address, f"{action} of slot {slot}: {response.status_code} {response.text[:200]}")
    return result
