"""Conversations outlast a switch of models (`keep_kv`): the KV cache of a server that is stopped is saved to files,
and restored when its model is loaded again.

A file is restored only to the same model (its file unchanged) under the same command line, in the same run of the
agent, and only if it is complete: llama-server checks none of that. The files contain conversations, so only the
agent's own user may read them. They are deleted once they were used, when the model's configuration changes, and when
the agent starts and ends. Other files in the folder are never touched.
"""

import errno
import hashlib
import logging
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec

from nodeagent.config import ModelConfig
from nodeagent.errors import UpstreamLost
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.slots import restore_slot, save_slot
from supervisor.spec import ChildSpec

logger = logging.getLogger(__name__)

# As `_file_name` makes them: only these are ours to delete.
_FILE_NAME = re.compile(r"[0-9a-f]{16}-[0-9]{1,4}\.kv")
_NO_FOLDER = "it is a symbolic link or a file, where the agent needs a folder of its own (keep_kv): remove it"

SaveSlot = Callable[[Upstream, int, str], Awaitable[tuple[int, int]]]
RestoreSlot = Callable[[Upstream, int, str], Awaitable[int]]


class _Saved(msgspec.Struct, frozen=True):
    """What was saved of one server: by slot the file and its size in bytes; and what it belongs to."""

    files: dict[int, tuple[Path, int]]
    spec: ChildSpec
    stamp: tuple[int, int] | None


class SavedCaches:
    """The saved caches, by child id; implements `seams.ServerHooks`.

    Caches of an earlier run are deleted at the start. `save_slot` and `restore_slot` behave as those
    of `slots`. What changes: `_saved`, in `save`, `discard` and `clear`.
    """

    def __init__(self, folder: Path, *, save_slot: SaveSlot = save_slot, restore_slot: RestoreSlot = restore_slot):
        self._folder = folder
        self._save_slot = save_slot
        self._restore_slot = restore_slot
        self._saved: dict[str, _Saved] = {}
        self.clear()

    def clear(self) -> None:
        """Delete every saved cache, those of an earlier run too, and the folder if nothing else is in it.

        What can't be deleted is a warning. A symbolic link is not followed: what it leads to may be anybody's.
        """
        self._saved.clear()
        try:
            _delete_caches(self._folder)
        except FileNotFoundError:
            return
        except OSError as error:
            reason = _NO_FOLDER if error.errno in (errno.ENOTDIR, errno.ELOOP) else error.strerror
            logger.warning("the caches in %s can't be deleted: %s", self._folder, reason)

    # What DeviceServers calls (seams.ServerHooks).

    def before_start(self, model: ModelConfig, spec: ChildSpec) -> bool:
        """Make the folder, without which the server does not start; return whether there is a cache to restore."""
        if not model.keep_kv:
            return False
        if self._folder.is_symlink() or (self._folder.exists() and not self._folder.is_dir()):
            raise NotADirectoryError(errno.ENOTDIR, _NO_FOLDER, str(self._folder))
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return spec.child_id in self._saved

    async def after_ready(self, model: ModelConfig, spec: ChildSpec, upstream: Upstream) -> None:
        if model.keep_kv:
            await self.restore(spec, model.path, upstream)

    def after_start(self, spec: ChildSpec) -> None:
        self.discard(spec.child_id)

    async def before_stop(self, model: ModelConfig, spec: ChildSpec, upstream: Upstream) -> None:
        """Save the caches, unless requests are in flight: the server would answer only after them."""
        if model.keep_kv and not upstream.in_flight:
            await self.save(spec, model.path, upstream, model.parallel)

    # What these consist of.

    async def save(self, spec: ChildSpec, model: Path, upstream: Upstream, slots: int) -> None:
        """Save the caches of a server that is about to be stopped. A slot that can't be saved is skipped."""
        self.discard(spec.child_id)
        files: dict[int, tuple[Path, int]] = {}
        for slot in range(slots):
            path = self._folder / _file_name(spec.child_id, slot)
            tokens = size = 0
            try:
                tokens, size = await self._save_slot(upstream, slot, path.name)
            except UpstreamLost as error:
                logger.warning("%s: the cache of slot %d is not saved: %s", spec.child_id, slot, error)
            if tokens:
                files[slot] = (path, size)
            else:
                _delete(path)
        if files:
            self._saved[spec.child_id] = _Saved(files, spec, _stamp(model))
            logger.info("%s: saved %d bytes of cache", spec.child_id, sum(size for _path, size in files.values()))

    async def restore(self, spec: ChildSpec, model: Path, upstream: Upstream) -> None:
        """Restore what was saved of a server to the same server, newly started, if it still belongs to it.

        The files stay until `discard`.
        """
        saved = self._saved.get(spec.child_id)
        if saved is None or saved.spec != spec or saved.stamp != _stamp(model):
            return
        try:
            for slot, (path, size) in saved.files.items():
                if _size(path) == size:
                    tokens = await self._restore_slot(upstream, slot, path.name)
                    logger.info("%s: restored %d tokens to slot %d", spec.child_id, tokens, slot)
        except UpstreamLost as error:
            logger.warning("%s: its cache is not restored: %s", spec.child_id, error)

    def discard(self, child_id: str) -> None:
        """Delete what was saved of that child."""
        saved = self._saved.pop(child_id, None)
        for path, _size in saved.files.values() if saved is not None else ():
            _delete(path)


def _delete_caches(folder: Path) -> None:
    """Delete the files in the folder that have a name of ours. Raises OSError, for a symbolic link too."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with os.scandir(opened) as entries:
            ours = [it.name for it in entries if _FILE_NAME.fullmatch(it.name) and it.is_file(follow_symlinks=False)]
        for name in ours:
            os.unlink(name, dir_fd=opened)
        others = os.listdir(opened)
    finally:
        os.close(opened)
    if not others:
        folder.rmdir()


def _delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("%s can't be deleted: %s", path, error)


def _file_name(child_id: str, slot: int) -> str:
    """llama-server accepts plain file names only; the hash is one, whatever the id contains."""
    return f"{hashlib.sha256(child_id.encode()).hexdigest()[:16]}-{slot}.kv"


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _stamp(model: Path) -> tuple[int, int] | None:
    """Size and modification time of the model's file; they change with it. None if the file can't be seen."""
    try:
        stat = model.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns
