"""The KV caches of stopped servers: what is saved, what is restored, and when the files are deleted."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from nodeagent.config import ModelConfig
from nodeagent.errors import UpstreamLost
from nodeagent.llama_server.relay import Upstream
from nodeagent.llama_server.saved_caches import SavedCaches
from supervisor.probe import ProcessView
from supervisor.spec import ChildSpec


class NeverCalled:
    async def check(self, process: ProcessView) -> str:
        raise AssertionError("a spec is only a value here")


OURS = "0123456789abcdef-0.kv"
SPEC = ChildSpec(
    child_id="cpu:0/m", group="cpu:0", argv=("llama-server",), env={}, probe=NeverCalled(), start_timeout_s=10
)


class FakeSlots:
    """A server's slots: `tokens` of each; those in `broken` fail. A saved file is `tokens` bytes long."""

    def __init__(self, folder: Path, *tokens: int) -> None:
        self.tokens = list(tokens)
        self.broken: set[int] = set()
        self.restored: dict[int, int] = {}
        self._folder = folder

    async def save(self, upstream: Upstream, slot: int, filename: str) -> tuple[int, int]:
        await trio.sleep(0.01)
        path = self._folder / filename
        path.write_bytes(bytes(self.tokens[slot]))
        self._fail_if_broken(upstream, slot)
        return self.tokens[slot], self.tokens[slot]

    async def restore(self, upstream: Upstream, slot: int, filename: str) -> int:
        await trio.sleep(0.01)
        self._fail_if_broken(upstream, slot)
        self.restored[slot] = (self._folder / filename).stat().st_size
        return self.restored[slot]

    def _fail_if_broken(self, upstream: Upstream, slot: int) -> None:
        if slot in self.broken:
            raise UpstreamLost(upstream.address, f"slot {slot} is broken")


class Server:
    """A model with its saved caches, and a server that has these tokens in its slots."""

    def __init__(self, folder: Path, *tokens: int, keep_kv: bool = True) -> None:
        path = folder / "m.gguf"
        path.write_bytes(b"weights")
        self.folder = folder / "kv"
        self.slots = FakeSlots(self.folder, *tokens)
        self.model = ModelConfig(model_id="m", path=path, keep_kv=keep_kv, parallel=len(tokens))
        self.caches = SavedCaches(self.folder, save_slot=self.slots.save, restore_slot=self.slots.restore)
        self.upstream = Upstream("127.0.0.1:1", "key")

    def files(self) -> int:
        return len(list(self.folder.iterdir())) if self.folder.exists() else 0

    async def run_once(self, spec: ChildSpec = SPEC) -> bool:
        """Start the server and stop it again; return whether there was something to restore."""
        had_cache = self.caches.before_start(self.model, spec)
        await self.caches.after_ready(self.model, spec, self.upstream)
        self.caches.after_start(spec)
        assert self.files() == 0, "used, and deleted"
        await self.caches.before_stop(self.model, spec, self.upstream)
        return had_cache


async def test_the_caches_of_all_slots_are_restored_to_the_same_server(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    server = Server(tmp_path, 500, 700)
    assert not await server.run_once()
    assert server.slots.restored == {}
    assert server.files() == 2
    assert await server.run_once()
    assert server.slots.restored == {0: 500, 1: 700}


async def test_only_the_agents_own_user_may_read_the_folder(tmp_path: Path, autojump_clock: MockClock) -> None:
    server = Server(tmp_path, 500)
    server.caches.before_start(server.model, SPEC)
    assert server.folder.stat().st_mode & 0o777 == 0o700


async def test_a_model_without_keep_kv_needs_no_folder_and_saves_nothing(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    server = Server(tmp_path, 500, keep_kv=False)
    assert not await server.run_once()
    assert not server.folder.exists()


async def test_nothing_is_restored_once_keep_kv_was_switched_off(tmp_path: Path, autojump_clock: MockClock) -> None:
    server = Server(tmp_path, 500)
    await server.run_once()
    server.model = server.model.model_copy(update={"keep_kv": False})
    assert not await server.run_once()
    assert server.slots.restored == {}
    assert server.files() == 0


async def test_nothing_is_saved_while_a_request_is_in_flight(tmp_path: Path, autojump_clock: MockClock) -> None:
    server = Server(tmp_path, 500)
    server.upstream.in_flight = 1
    await server.run_once()
    assert server.files() == 0


async def test_an_empty_slot_leaves_no_file(tmp_path: Path, autojump_clock: MockClock) -> None:
    server = Server(tmp_path, 0, 700)
    await server.run_once()
    assert server.files() == 1
    await server.run_once()
    assert server.slots.restored == {1: 700}


async def test_a_server_with_empty_slots_has_nothing_to_restore(tmp_path: Path, autojump_clock: MockClock) -> None:
    server = Server(tmp_path, 0, 0)
    await server.run_once()
    assert not await server.run_once()


async def test_a_slot_that_can_not_be_saved_is_skipped_and_its_file_deleted(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path, 500, 700)
    server.slots.broken = {0}
    await server.run_once()
    assert server.files() == 1
    assert caplog.messages == ["cpu:0/m: the cache of slot 0 is not saved: 127.0.0.1:1: slot 0 is broken"]
    server.slots.broken = set()
    await server.run_once()
    assert server.slots.restored == {1: 700}


async def test_a_cache_that_can_not_be_restored_is_logged_and_deleted(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path, 500, 700)
    await server.run_once()
    server.slots.broken = {0}
    await server.run_once()
    assert server.slots.restored == {}
    assert "cpu:0/m: its cache is not restored: 127.0.0.1:1: slot 0 is broken" in caplog.messages


async def test_nothing_is_restored_to_a_server_with_another_command_line(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    server = Server(tmp_path, 500)
    await server.run_once()
    await server.run_once(replace(SPEC, argv=("llama-server", "-c", "4096")))
    assert server.slots.restored == {}


async def test_nothing_is_restored_once_the_models_file_has_changed(tmp_path: Path, autojump_clock: MockClock) -> None:
    server = Server(tmp_path, 500)
    await server.run_once()
    server.model.path.write_bytes(b"other weights")
    await server.run_once()
    stat = server.model.path.stat()
    os.utime(server.model.path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    await server.run_once()
    assert server.slots.restored == {}
    server.model.path.unlink()
    await server.run_once()
    assert server.slots.restored == {}


@pytest.mark.parametrize("damaged", [b"cut", None], ids=["truncated", "deleted"])
async def test_a_file_that_is_not_as_it_was_saved_is_not_restored(
    damaged: bytes | None, tmp_path: Path, autojump_clock: MockClock
) -> None:
    server = Server(tmp_path, 500, 700)
    await server.run_once()
    first = min(server.folder.iterdir(), key=lambda path: path.stat().st_size)
    if damaged is None:
        first.unlink()
    else:
        first.write_bytes(damaged)
    await server.run_once()
    assert server.slots.restored == {1: 700}


async def test_a_file_that_can_not_be_deleted_is_a_warning(
    tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(tmp_path, 500)
    await server.run_once()
    [file] = server.folder.iterdir()
    file.unlink()
    file.mkdir()
    server.caches.discard("cpu:0/m")
    assert f"{file} can't be deleted" in caplog.text


async def test_files_of_an_earlier_run_are_deleted_and_all_at_the_end(
    tmp_path: Path, autojump_clock: MockClock
) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / OURS).write_bytes(b"old")
    server = Server(tmp_path, 500)
    assert not server.folder.exists()
    await server.run_once()
    server.caches.clear()
    assert not server.folder.exists()
    assert not await server.run_once()


async def test_servers_of_different_names_have_files_of_their_own(tmp_path: Path, autojump_clock: MockClock) -> None:
    server = Server(tmp_path, 500)
    for child_id in ("cpu:0/m", "cpu:1/m", "cpu:0/../m"):
        server.caches.before_start(server.model, SPEC)
        await server.caches.before_stop(server.model, replace(SPEC, child_id=child_id), server.upstream)
    assert server.files() == 3


def test_only_files_of_ours_are_deleted_at_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "kv"
    precious = [folder / name for name in ("thesis.tex", "notes.kv", f"{OURS}.bak", OURS.upper(), "0123-0.kv")]
    folder.mkdir()
    for path in (*precious, folder / OURS):
        path.write_text("x")
    (folder / "0123456789abcdef-1.kv").mkdir()
    (folder / "0123456789abcdef-2.kv").symlink_to(precious[0])
    SavedCaches(folder)
    assert not (folder / OURS).exists()
    assert len(list(folder.iterdir())) == len(precious) + 2
    assert all(path.read_text() == "x" for path in precious)
    assert caplog.messages == []


def test_a_folder_with_nothing_but_caches_is_deleted(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir()
    (tmp_path / "kv" / OURS).write_text("x")
    SavedCaches(tmp_path / "kv")
    assert not (tmp_path / "kv").exists()


@pytest.mark.parametrize("kind", ["link", "dangling link", "file"])
def test_what_is_no_folder_is_left_alone_with_a_warning_and_is_an_error_for_keep_kv(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    elsewhere, in_place = tmp_path / "elsewhere", tmp_path / "kv"
    if kind == "file":
        in_place.write_text("x")
    else:
        in_place.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.mkdir()
        (elsewhere / OURS).write_text("x")
    server = Server(tmp_path, 500)
    [warning] = caplog.messages
    assert warning.startswith(f"the caches in {in_place} can't be deleted: it is a symbolic link or a file")
    with pytest.raises(NotADirectoryError, match="where the agent needs a folder of its own") as refused:
        server.caches.before_start(server.model, SPEC)
    assert refused.value.filename == str(in_place)
    assert in_place.is_symlink() or in_place.read_text() == "x"
    assert elsewhere.exists() == (elsewhere / OURS).exists() == (kind == "link")
