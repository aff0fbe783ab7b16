"""What the files of the configured models say: their headers, and what is wrong with them.

A file is looked at when the agent starts and again each time its model is loaded: a mount may come later.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from nodeagent.config import ModelConfig
from nodeagent.config.server_flags import sets_flag
from nodeagent.devices.values import DeviceRef
from nodeagent.gguf.header import GgufError, GgufHeader, read_header

logger = logging.getLogger(__name__)

# A header takes a tenth of a second, a disk that has to spin up some more; what takes longer is a mount that hangs, and
# neither the node's start nor a lane may hang with it.
PATIENCE_S = 10.0

# By these a part of the model lies elsewhere than on its device (the experts of a large one in the host's memory, say),
# or takes less room there than is estimated.
_SPARING = ("cpu-moe", "n-cpu-moe", "override-tensor", "kv-offload", "cache-type-k", "cache-type-v")


class Catalogue:
    """Headers and problems by model id. Only `inspect` writes them."""

    def __init__(self, *, read: Callable[[Path], GgufHeader] = read_header, patience_s: float = PATIENCE_S) -> None:
        self._read = read
        self._patience_s = patience_s
        # One thread for each model: a mount that hangs must not take those of other models, or of the devices.
        self._threads = defaultdict[str, trio.CapacityLimiter](lambda: trio.CapacityLimiter(1))
        self._headers: dict[str, GgufHeader] = {}
        self._problems: dict[str, str] = {}

    def header(self, model_id: str) -> GgufHeader | None:
        """The header as last read, None if it never could be."""
        return self._headers.get(model_id)

    def problem(self, model_id: str) -> str | None:
        """What was wrong with the file at the last look, None if nothing was."""
        return self._problems.get(model_id)

    async def inspect(self, model: ModelConfig) -> str | None:
        """Look at the model's file now, for so long as is fit; return what is wrong with it, None if nothing is."""
        try:
            with trio.fail_after(self._patience_s):
                # In a thread: the file may lie on a slow or hanging mount.
                self._headers[model.model_id] = await trio.to_thread.run_sync(
                    self._read, model.path, abandon_on_cancel=True, limiter=self._threads[model.model_id]
                )
        except GgufError as error:
            self._problems[model.model_id] = str(error)
        except trio.TooSlowError:
            self._problems[model.model_id] = f"{model.path}: could not be read within {self._patience_s:g} s"
        else:
            self._problems.pop(model.model_id, None)
        return self._problems.get(model.model_id)

    async def inspect_all(self, models: Sequence[ModelConfig]) -> None:
        """Look at every file, all at once, and log a warning for each that can't be used."""
        async with trio.open_nursery() as looks:
            for model in models:
                looks.start_soon(self.inspect, model)
        for model in models:
            problem = self.problem(model.model_id)
            if problem is not None:
                logger.warning(
                    "model %s can't be loaded: %s; it is looked at again when asked for", model.model_id, problem
                )


def misfit(header: GgufHeader, model: ModelConfig, device: DeviceRef) -> str | None:
    """Why this model is known not to fit on this device, None where it may.

    On a GPU llama-server by itself offloads only as many layers as fit, so only a model whose layers are all asked
    for there (`gpu_layers`) is known not to. On a CPU the weights are mapped, and need not all be in memory at once.
    """
    total = device.memory_total_bytes
    if total is None or any(sets_flag(model.server_args, flag) for flag in _SPARING):
        return None
    on_cpu = device.backend == "cpu"
    if not on_cpu and (model.gpu_layer_count is None or model.gpu_layer_count < header.layers):
        return None
    needed = header.estimate_bytes(ctx_size=model.ctx_size) - (header.size_bytes if on_cpu else 0)
    if needed <= total:
        return None
    return f"needs about {needed / 2**30:.1f} GiB, and the device has {total / 2**30:.1f} GiB"
