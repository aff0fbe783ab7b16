"""The context that a server really has: `--fit` may have shrunk it, and none is larger than the model was trained for.

`GET /props` has `default_generation_settings.n_ctx`, the tokens of one slot (build b10068; with `--kv-unified` all
slots share them).
"""

import msgspec

from nodeagent.config import ModelConfig
from nodeagent.gguf.header import GgufHeader
from nodeagent.llama_server.control import ask
from nodeagent.llama_server.fit import settings
from nodeagent.llama_server.relay import Upstream

_TIMEOUT_S = 10.0
# Among others it has the chat template.
_MAX_BYTES = 4 * 2**20


class _Settings(msgspec.Struct):
    n_ctx: int = 0


class _Props(msgspec.Struct):
    default_generation_settings: _Settings


async def read_slot_ctx_size(upstream: Upstream) -> int | None:
    """How many tokens of context a slot of the server has, None if it does not say so. Raises ControlError."""
    reply = await ask(upstream.address, upstream.api_key, "/props", timeout_s=_TIMEOUT_S, max_bytes=_MAX_BYTES)
    return reply.read_as(_Props).default_generation_settings.n_ctx or None if reply.status == 200 else None


def shrunk(model: ModelConfig, header: GgufHeader | None, slot_ctx_size: int) -> str | None:
    """What to tell people of a server whose slots have less context than was asked for, None if they have not."""
    asked = settings(model)
    ctx_train = header.ctx_train if header is not None else None
    ctx_size = asked.ctx_size or (ctx_train if asked.ctx_size == 0 else None)
    if ctx_size is None:
        return None
    wanted = ctx_size if asked.unified else ctx_size // asked.parallel
    if slot_ctx_size >= wanted:
        return None
    why = "the model was trained for no more" if slot_ctx_size == ctx_train else "llama-server fitted it to the memory"
    return f"each slot has {slot_ctx_size} tokens of context, and {wanted} were asked for: {why}"
