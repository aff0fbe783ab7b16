"""llama-server's slots: their KV cache saved to a file and restored from it.

`POST /slots/{id}?action=save|restore {"filename": ...}`, in the folder of `--slot-save-path`; the responses have
`n_saved`, `n_written` (bytes) and `n_restored`. Tried on builds b10068 and b10434.
"""

import msgspec

from nodeagent.errors import UpstreamLost
from nodeagent.llama_server.control import ControlError, ask
from nodeagent.llama_server.relay import Upstream

# Writing 35 MB (1,500 tokens of a small model) takes 11 ms; this is for a disk that hangs.
_TIMEOUT_S = 10.0
_MAX_BYTES = 64 * 1024


class _Done(msgspec.Struct):
    n_saved: int = 0
    n_written: int = 0
    n_restored: int = 0


async def save_slot(upstream: Upstream, slot: int, filename: str) -> tuple[int, int]:
    """Save the slot's cache; return its tokens and the file's size in bytes. Raises UpstreamLost."""
    result = await _act(upstream, slot, "save", filename)
    return result.n_saved, result.n_written


async def restore_slot(upstream: Upstream, slot: int, filename: str) -> int:
    """Restore a cache to the slot; return its tokens. Raises UpstreamLost.

    The server aborts on a truncated file, and accepts that of another model with the same shape without an error: give
    it only a complete file that the same model wrote.
    """
    return (await _act(upstream, slot, "restore", filename)).n_restored


async def _act(upstream: Upstream, slot: int, action: str, filename: str) -> _Done:
    path = f"/slots/{slot}?action={action}"
    try:
        reply = await ask(
            upstream.address,
            upstream.api_key,
            path,
            timeout_s=_TIMEOUT_S,
            max_bytes=_MAX_BYTES,
            method="POST",
            body={"filename": filename},
        )
    except ControlError as error:
        raise UpstreamLost(upstream.address, f"{action} of slot {slot}: {error}") from error
    try:
        if reply.status == 200:
            return reply.read_as(_Done)
    except ControlError as error:
        raise UpstreamLost(upstream.address, f"{action} of slot {slot}: {reply.shown()} ({error})") from error
    raise UpstreamLost(upstream.address, f"{action} of slot {slot}: {reply.shown()}")
