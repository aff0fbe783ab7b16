"""Which agent a command is for."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from nodeagent.cli.discovery import default_state_dir, find_state_dir, is_running
from nodeagent.errors import ConfigError, StartupError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    return tmp_path / "home"


@contextmanager
def running(state_dir: Path) -> Iterator[Path]:
    """As an agent does: hold the folder's lock."""
    state_dir.mkdir(parents=True)
    with (state_dir / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield state_dir


def written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_folder_is_in_use_while_its_lock_is_held(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    assert not is_running(folder)
    with running(folder):
        assert is_running(folder)
    assert not is_running(folder)


def test_a_configuration_names_its_agent(tmp_path: Path) -> None:
    config = written(tmp_path / "a.yaml", "state_dir: here\nmodels: [{model_id: a, path: a}]\n")
    assert find_state_dir(config) == tmp_path / "here"


@pytest.mark.parametrize(
    "broken", ["state_dir: here\nmodels: []\nno_such_key: 1\n", "state_dir: here\n", "models: 7\nstate_dir: ./here\n"]
)
def test_a_configuration_with_errors_still_names_its_agent(tmp_path: Path, broken: str) -> None:
    config = written(tmp_path / "a.yaml", broken)
    with running(tmp_path / "here") as folder:
        assert find_state_dir(config) == folder
    with pytest.raises(ConfigError):  # no agent runs there: the errors are what matters
        find_state_dir(config)


def test_a_configuration_with_errors_that_names_a_node_has_the_folder_of_that_node(tmp_path: Path) -> None:
    config = written(tmp_path / "a.yaml", "node_id: box\nlisten_port: many\n")
    with running(default_state_dir("box")) as folder:
        assert find_state_dir(config) == folder


@pytest.mark.parametrize("hopeless", ["models: [\n", "- a list\n", "state_dir: 7\n"])
def test_a_configuration_that_tells_nothing_is_reported_as_it_is(tmp_path: Path, hopeless: str) -> None:
    with pytest.raises(ConfigError):
        find_state_dir(written(tmp_path / "a.yaml", hopeless))


def test_a_configuration_that_is_not_there_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be read"):
        find_state_dir(tmp_path / "missing.yaml")


def test_without_a_configuration_the_default_node_comes_first(home: Path) -> None:
    assert find_state_dir(None) == default_state_dir()
    with running(default_state_dir()), running(home / "rolemesh-node-agent-demo" / "8081" / "state"):
        assert find_state_dir(None) == default_state_dir()


@pytest.mark.parametrize("place", ["rolemesh-node-agent/box", "rolemesh-node-agent-demo/8099/state"])
def test_without_a_configuration_the_only_agent_or_demo_is_found(home: Path, place: str) -> None:
    with running(home / place) as folder:
        assert find_state_dir(None) == folder


def test_several_agents_without_a_configuration_are_an_error_that_names_them(home: Path) -> None:
    root = home / "rolemesh-node-agent"
    message = r"several agents are running .*/a, .*/b\): name one by --config FILE"
    with running(root / "a"), running(root / "b"), pytest.raises(StartupError, match=message):
        find_state_dir(None)


def test_a_user_without_a_home_folder_is_a_configuration_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setattr("platformdirs.user_state_path", lambda: Path("~/.local/state"))
    with pytest.raises(ConfigError, match="state_dir: must be set: this user has no home folder"):
        find_state_dir(None)
