"""What is known of the configured models' files: their headers, and what is wrong with them.

A file is inspected when the agent starts and again each time its model is loaded: a file system may be mounted later.
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

# Reading a header takes a tenth of a second, and longer while a disk spins up. What takes longer still is a mount that
# hangs, and neither the start of the node nor a lane may hang with it.
PATIENCE_S = 10.0

# These flags keep a part of the model off its device (say, the experts of a large one in the host's memory), or make it
# smaller than is estimated.
_REDUCE_MEMORY = ("cpu-moe", "n-cpu-moe", "override-tensor", "kv-offload", "cache-type-k", "cache-type-v")


class Catalogue:
    """Headers and problems by model id. Only `inspect` writes them."""

    def __init__(self, *, read: Callable[[Path], GgufHeader] = read_header, patience_s: float = PATIENCE_S) -> None:
        self._read = read
        self._patience_s = patience_s
        # One thread for each model: a mount that hangs must not use up the threads of other models and of the devices.
        self._threads = defaultdict[str, trio.CapacityLimiter](lambda: trio.CapacityLimiter(1))
        self._headers: dict[str, GgufHeader] = {}
        self._problems: dict[str, str] = {}

    def header(self, model_id: str) -> GgufHeader | None:
        """The header as last read, None if it never could be."""
        return self._headers.get(model_id)

    def problem(self, model_id: str) -> str | None:
        """What was wrong with the file when it was last inspected, None if nothing was."""
        return self._problems.get(model_id)

    async def inspect(self, model: ModelConfig) -> str | None:
        """Read the model's header, for `patience_s` at most; return what is wrong with the file, None if nothing is."""
        try:
            with trio.fail_after(self._patience_s):
                # In a thread: the file may be on a mount that is slow or hangs.
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
        """Inspect every file, all at once, and log a warning for each that can't be used."""
        async with trio.open_nursery() as nursery:
            for model in models:
                nursery.start_soon(self.inspect, model, name=f"inspect {model.model_id}")
        for model in models:
            problem = self.problem(model.model_id)
            if problem is not None:
                logger.warning(
                    "model %s can't be loaded: %s; the file is checked again with each load", model.model_id, problem
                )


def misfit(header: GgufHeader, model: ModelConfig, device: DeviceRef) -> str | None:
    """Why this model is known not to fit on this device, None if it may fit.

    llama-server by default offloads only as many layers to a GPU as fit, so a model is known not to fit only if all of
    its layers are requested there (`gpu_layers`). On a CPU the weights are mapped, and need not all be in memory.
    """
    total = device.memory_total_bytes
    if total is None or any(sets_flag(model.server_args, flag) for flag in _REDUCE_MEMORY):
        return None
    layers = model.gpu_layer_count
    if device.backend != "cpu" and (layers is None or layers < header.layers):
        return None
    needed = bytes_on_device(header, model, device)
    if needed <= total:
        return None
    return f"needs about {needed / 2**30:.1f} GiB, and the device has {total / 2**30:.1f} GiB"


def bytes_on_device(header: GgufHeader, model: ModelConfig, device: DeviceRef) -> int:
    """The estimated memory of one more server of the model on the device.

    On a CPU the weights do not count: they are mapped from the file, all servers share them, and the system reclaims
    the memory if it needs it.
    """
    needed = header.estimate_bytes(model.ctx_size, model.parallel, model.ubatch_size)
    return needed - header.size_bytes if device.backend == "cpu" else needed
