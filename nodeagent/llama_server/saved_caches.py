"""Conversations outlast a switch of models: the cache (KV) of a server that is stopped, kept in files until its model
is loaded again.

A file is given back only to the same model (its file unchanged) under the same command line, in the same life of the
agent, and only whole: llama-server checks none of that by itself. Files hold conversations, so nobody else may read
them, and they go when they were used, when the model changes, and when the agent starts and ends.
"""

import hashlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from nodeagent.errors import UpstreamLost
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.slots import restore_slot, save_slot
from supervisor.spec import ChildSpec

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kept:
    """What was kept of one server: by slot the file and its size in bytes, and what it belongs to."""

    files: dict[int, tuple[Path, int]]
    spec: ChildSpec
    stamp: tuple[int, int] | None


class SavedCaches:
    """The kept caches, by child id. The folder is this agent's alone; what is in it is of an earlier life, and goes.

    What changes: `_kept`, in `keep`, `forget` and `clear`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kept: dict[str, _Kept] = {}
        self.clear()

    def clear(self) -> None:
        """Delete everything, what an earlier life left too."""
        self._kept.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def make_folder(self) -> None:
        """Make it, for the agent's own user alone; raises OSError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def has(self, child_id: str) -> bool:
        return child_id in self._kept

    async def keep(self, spec: ChildSpec, model: Path, upstream: Upstream, slots: int) -> None:
        """Write the caches of a server that is about to be stopped. What can't be written is not kept."""
        self.forget(spec.child_id)
        files: dict[int, tuple[Path, int]] = {}
        for slot in range(slots):
            path = self.folder / _file_name(spec.child_id, slot)
            tokens = size = 0
            try:
                tokens, size = await save_slot(upstream, slot, path.name)
            except UpstreamLost as error:
                logger.warning("%s: its cache is not kept: %s", spec.child_id, error)
            if tokens:
                files[slot] = (path, size)
            else:
                _delete(path)
        if files:
            self._kept[spec.child_id] = _Kept(files, spec, _stamp(model))
            logger.info("%s: kept %d bytes of cache", spec.child_id, sum(size for _path, size in files.values()))

    async def bring_back(self, spec: ChildSpec, model: Path, upstream: Upstream) -> None:
        """Read into a server that was just started what was kept of it, if that is still right for it. The files stay
        until `forget`."""
        kept = self._kept.get(spec.child_id)
        if kept is None:
            return
        try:
            if kept.spec == spec and kept.stamp == _stamp(model):
                for slot, (path, size) in kept.files.items():
                    if _size(path) == size:
                        tokens = await restore_slot(upstream, slot, path.name)
                        logger.info("%s: slot %d has its %d tokens back", spec.child_id, slot, tokens)
        except UpstreamLost as error:
            logger.warning("%s: its cache is not brought back: %s", spec.child_id, error)

    def forget(self, child_id: str) -> None:
        """Delete what was kept of that child."""
        kept = self._kept.pop(child_id, None)
        for path, _size in kept.files.values() if kept is not None else ():
            _delete(path)


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s can't be deleted: %s", path, error)


def _file_name(child_id: str, slot: int) -> str:
    """llama-server takes plain names only."""
    return f"{hashlib.sha256(child_id.encode()).hexdigest()[:16]}-{slot}.kv"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _stamp(model: Path) -> tuple[int, int] | None:
    """What changes with the model's file."""
    try:
        stat = model.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
