"""What a model is for, and the flags that its server needs for it.

llama-server embeds and reranks only with flags of their own. The model's file says which task it is for; the key `task`
overrides that, and whoever sets the flags in `server_args` gets just these.
"""

from typing import Final

from nodeagent.config import ModelConfig
from nodeagent.config.server_flags import sets_flag
from nodeagent.gguf.header import GgufHeader, Task

_FLAGS: Final = {"embedding": "--embeddings", "rerank": "--rerank"}
# A text to embed must fit into one batch. Its buffers grow with the square of its size on some devices, so the long
# contexts of newer models are used only as far as someone configures.
_LONGEST_BATCH: Final = 8192


def task_of(model: ModelConfig, header: GgufHeader | None) -> Task | None:
    """The one task that the model's server does; None if that is not known, so that the server has to judge."""
    if model.task is not None:
        return model.task
    if header is None:
        return None
    # Every request asks, and most models have no flags.
    if model.server_args and any(sets_flag(model.server_args, flag) for flag in ("embeddings", "rerank")):
        return None
    return header.task


def task_args(model: ModelConfig, header: GgufHeader | None) -> list[str]:
    """The flags for embedding or reranking; none for a chat model."""
    task = task_of(model, header)
    if task not in _FLAGS:
        return []
    args = [] if sets_flag(model.server_args, _FLAGS[task].removeprefix("--")) else [_FLAGS[task]]
    has_pooling = (header is not None and header.pools) or sets_flag(model.server_args, "pooling")
    if task == "embedding" and not has_pooling:
        args += ["--pooling", "mean"]  # without any, it would embed each token by itself
    return args + _batch_args(model, header)


def _batch_args(model: ModelConfig, header: GgufHeader | None) -> list[str]:
    """One batch for the longest text that a slot takes."""
    context = model.ctx_size or (header.ctx_train if header is not None else None)
    if context is None or model.batch_size is not None or model.ubatch_size is not None:
        return []
    if any(sets_flag(model.server_args, flag) for flag in ("batch-size", "ubatch-size")):
        return []
    size = context // model.parallel if model.ctx_size else min(context, _LONGEST_BATCH)
    return ["-b", str(max(size, 1)), "-ub", str(max(size, 1))]
