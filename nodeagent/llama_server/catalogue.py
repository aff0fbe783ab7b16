"""What is known of the configured models' files: their headers, and what is wrong with them.

A file is inspected when the agent starts and again each time its model is loaded: a file system may be mounted later.
"""

import logging
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import trio
from msgspec.structs import replace

from nodeagent.config import ModelConfig, NodeConfig
from nodeagent.devices.values import DeviceRef
from nodeagent.errors import Problem
from nodeagent.gguf.header import Companion, GgufError, GgufHeader, read_companion, read_header
from nodeagent.llama_server.fit import misfit
from nodeagent.llama_server.spans import runs_on, spans_of

logger = logging.getLogger(__name__)

# Reading a header takes a tenth of a second, and longer while a disk spins up. What takes longer still is a mount that
# hangs, and neither the start of the node nor a lane may hang with it.
PATIENCE_S = 10.0


class Catalogue:
    """Headers and problems by model id. Only `inspect` writes them. `changes` counts the headers that were read.

    `look_at_programs` is called with each inspection: what a load needs to know of the llama-servers themselves.
    """

    def __init__(
        self,
        *,
        read: Callable[[Path], GgufHeader] = read_header,
        patience_s: float = PATIENCE_S,
        look_at_programs: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint,
    ) -> None:
        self._read = read
        self._look_at_programs = look_at_programs
        self._patience_s = patience_s
        # One thread for each model: a mount that hangs must not use up the threads of other models and of the devices.
        self._threads = defaultdict[str, trio.CapacityLimiter](lambda: trio.CapacityLimiter(1))
        self.changes = 0
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
        await self._look_at_programs()
        try:
            with trio.fail_after(self._patience_s):
                # In a thread: the file may be on a mount that is slow or hangs.
                self._headers[model.model_id] = await trio.to_thread.run_sync(
                    _read_all, model, self._read, abandon_on_cancel=True, limiter=self._threads[model.model_id]
                )
                self.changes += 1
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


def fits_nowhere(config: NodeConfig, devices: Sequence[DeviceRef]) -> list[Problem]:
    """The models that fit on none of these devices, with the figures of each device. Blocks on the disk; a file that
    can't be read is not judged."""
    found = []
    for index, model in enumerate(config.models):
        with suppress(GgufError):
            header = _read_all(model, read_header)
            allowed = [device for device in (*devices, *spans_of(config, devices)) if runs_on(model, device)]
            reasons = [(device.device_id, misfit(header, model, device)) for device in allowed]
            if reasons and all(reason is not None for _, reason in reasons):
                said = "; ".join(f"{device_id}: {reason}" for device_id, reason in reasons)
                found.append(config.problem(("models", index), f"fits on no device: {said}"))
    return found


def _read_all(model: ModelConfig, read: Callable[[Path], GgufHeader]) -> GgufHeader:
    """The model's header, with what is loaded beside it."""
    header = read(model.path)
    beside = [] if model.mmproj is None else [read_companion(model.mmproj, Companion.PROJECTOR)]
    beside += [read_companion(lora.path, Companion.ADAPTER) for lora in model.loras]
    draft = None if model.draft_model is None else read(model.draft_model)
    return replace(header, beside_bytes=sum(beside), draft=draft) if beside or draft else header
