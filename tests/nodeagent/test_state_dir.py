"""The agent's folder: one agent at a time, its token, its address."""

import errno
import fcntl
import os
from pathlib import Path

import pytest

from nodeagent import state_dir
from nodeagent.errors import StartupError


def test_the_folder_is_created_and_can_be_locked_again_after_its_agent_has_ended(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "state"
    for _ in range(2):
        with state_dir.locked(folder):
            assert (folder / "lock").read_text() == f"{os.getpid()}\n"


def test_the_pid_of_an_earlier_agent_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("123456789012\n")
    with state_dir.locked(tmp_path):
        assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"


def test_a_second_agent_is_told_who_holds_the_folder(tmp_path: Path) -> None:
    with state_dir.locked(tmp_path):
        for _ in range(2):  # the first attempt has not released the lock
            held = rf"in use by another agent \(pid {os.getpid()}\)"
            with pytest.raises(StartupError, match=held), state_dir.locked(tmp_path):
                pass


def test_an_agent_that_could_not_write_its_pid_is_unknown(tmp_path: Path) -> None:
    file = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(StartupError, match="pid unknown"), state_dir.locked(tmp_path):
        pass
    os.close(file)


def test_a_file_system_without_locks_is_not_mistaken_for_another_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(_file: int, _operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    reason = r"can't be locked: No locks available; its file system has to support flock\(2\)"
    with pytest.raises(StartupError, match=reason), state_dir.locked(tmp_path):
        pass


def test_the_lock_is_released_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), state_dir.locked(tmp_path):
        raise ZeroDivisionError
    with state_dir.locked(tmp_path):
        pass


def test_a_folder_that_can_not_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    unusable = r"state_dir .*/file/state can't be used: Not a directory"
    with pytest.raises(StartupError, match=unusable), state_dir.locked(tmp_path / "file" / "state"):
        pass
    (tmp_path / "lock").mkdir()
    with pytest.raises(StartupError, match="can't be used: Is a directory"), state_dir.locked(tmp_path):
        pass


def test_the_paths_in_the_folder_are_fixed() -> None:
    assert state_dir.children_file(Path("/state")) == Path("/state/children.json")
    assert state_dir.kv_folder(Path("/state")) == Path("/state/kv")


def test_the_token_is_created_once_for_its_user_alone(tmp_path: Path) -> None:
    token = state_dir.admin_token(tmp_path)
    assert len(token) >= 43  # 32 bytes in base64
    assert state_dir.admin_token(tmp_path) == token
    assert (tmp_path / "admin.token").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in tmp_path.iterdir()] == ["admin.token"]
    (tmp_path / "admin.token").unlink()
    assert state_dir.admin_token(tmp_path) != token


def test_a_token_that_was_half_written_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "admin.new").write_text("half")
    assert state_dir.admin_token(tmp_path) != "half"


@pytest.mark.parametrize("content", [b"", b" \n"])
def test_an_empty_token_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "admin.token").write_bytes(content)
    with pytest.raises(StartupError, match="is empty; remove it"):
        state_dir.admin_token(tmp_path)


def test_a_token_that_can_not_be_read_or_created_is_refused(tmp_path: Path) -> None:
    (tmp_path / "admin.token").write_bytes("tökén".encode())
    with pytest.raises(StartupError, match=r"admin\.token can't be used"):
        state_dir.admin_token(tmp_path)
    with pytest.raises(StartupError, match="No such file"):
        state_dir.admin_token(tmp_path / "missing")


def test_the_address_is_found_again(tmp_path: Path) -> None:
    for base_url in ("http://127.0.0.1:8081", "http://[::1]:1"):
        state_dir.write_address(tmp_path, base_url)
        assert state_dir.read_address(tmp_path) == base_url
    assert [path.name for path in tmp_path.iterdir()] == ["address"]


def test_the_copy_of_the_certificate_follows_the_certificate(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    certificate = tmp_path / "node.pem"
    for content in ("one", "two"):
        certificate.write_text(content)
        state_dir.write_certificate(tmp_path, certificate)
        assert state_dir.certificate_file(tmp_path).read_text() == content
    state_dir.write_certificate(tmp_path, None)
    assert not state_dir.certificate_file(tmp_path).exists()
    state_dir.write_certificate(tmp_path / "missing", certificate)
    assert "commands may not trust this agent" in caplog.text


def test_an_address_that_can_not_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state_dir.write_address(tmp_path / "missing", "http://127.0.0.1:8081")
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert "commands may not find this agent: No such file" in record.getMessage()


def test_there_is_no_address_where_no_agent_has_run(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="no agent has run with state_dir"):
        state_dir.read_address(tmp_path)
