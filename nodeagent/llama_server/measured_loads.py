"""What loads took, kept in a file: a measurement beats an estimate, also after a restart of the agent."""

import logging
from pathlib import Path
from typing import Annotated

import msgspec

from nodeagent.whole_files import replace_file

logger = logging.getLogger(__name__)

# A node has tens of models on some devices, and their arguments change now and then. The oldest go first.
_MOST_LOADS = 256
_MAX_BYTES = 2**20
# One part new to three parts old, as in scheduling's averages.
_NEWEST_WEIGHT = 0.25

Count = Annotated[int, msgspec.Meta(ge=0)]


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What loads took under one key. `load_s` is from spawn to ready, a moving average; `memory_bytes` is what the last
    one took of the device's memory, None if unknown. The ids are for people who read the file."""

    key: str
    model_id: str
    device_id: str
    load_s: Annotated[float, msgspec.Meta(ge=0)]
    memory_bytes: Count | None = None


class Shortage(msgspec.Struct, frozen=True, kw_only=True):
    """The last load under that key ran out of the device's memory: it needs at least `least_bytes`."""

    key: str
    model_id: str
    device_id: str
    least_bytes: Count


class _File(msgspec.Struct, kw_only=True):
    loads: list[Load]
    shortages: list[Shortage] = []


class MeasuredLoads:
    """Loads and shortages by key; `changes` counts how often they changed. What changes: all three, in `put`,
    `put_shortage` and `drop_shortage`."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.changes = 0
        kept = _read(file)
        self._loads = {load.key: load for load in kept.loads[-_MOST_LOADS:]}
        self._shortages = {shortage.key: shortage for shortage in kept.shortages[-_MOST_LOADS:]}
        self._is_writable = True

    def get(self, key: str) -> Load | None:
        return self._loads.get(key)

    def shortage(self, key: str) -> Shortage | None:
        return self._shortages.get(key)

    def put_shortage(self, shortage: Shortage) -> None:
        """A load with this key ran out of the device's memory."""
        self._shortages.pop(shortage.key, None)
        self._shortages[shortage.key] = shortage
        while len(self._shortages) > _MOST_LOADS:
            del self._shortages[next(iter(self._shortages))]
        self.changes += 1

    def drop_shortage(self, key: str) -> bool:
        """Forget the shortage with this key; return whether there was one."""
        if self._shortages.pop(key, None) is None:
            return False
        self.changes += 1
        return True

    def put(self, load: Load) -> None:
        """Take in another load with this key, which succeeded. What it took says more than an earlier shortage."""
        if load.memory_bytes is not None:
            self._shortages.pop(load.key, None)
        before = self._loads.pop(load.key, load)
        load_s = before.load_s + _NEWEST_WEIGHT * (load.load_s - before.load_s)
        known_bytes = before.memory_bytes if load.memory_bytes is None else load.memory_bytes
        self._loads[load.key] = msgspec.structs.replace(load, load_s=round(load_s, 3), memory_bytes=known_bytes)
        while len(self._loads) > _MOST_LOADS:
            del self._loads[next(iter(self._loads))]
        self.changes += 1

    def encoded(self) -> bytes:
        """The file's content."""
        kept = _File(loads=list(self._loads.values()), shortages=list(self._shortages.values()))
        return msgspec.json.format(msgspec.json.encode(kept), indent=1)

    def write(self, content: bytes) -> None:
        """Replace the file as a whole. Blocks; if it can't be written, logs so once."""
        try:
            replace_file(self._file, content)
        except OSError as error:
            if self._is_writable:
                logger.warning("%s can't be written, so measured loads are not kept: %s", self._file, error.strerror)
            self._is_writable = False
        else:
            self._is_writable = True


def _read(file: Path) -> _File:
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_BYTES)
        return msgspec.json.decode(content, type=_File)
    except FileNotFoundError:
        return _File(loads=[])
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError) as error:
        logger.warning("%s can't be read, so loads are measured anew: %s", file, error)
        return _File(loads=[])
