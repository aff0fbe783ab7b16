"""Which running agent an operator's command is for: its state folder, from which address and token are read.

With `--config`, the folder of that configuration, even if the file has errors by now: the agent runs with what it read
before. Without it, the folder of the default node, else of the one agent or demo that runs on this host as this user.
"""

import fcntl
from collections.abc import Iterator
from pathlib import Path

import platformdirs

from nodeagent.cli.demo import DEMO_APP
from nodeagent.config import NodeConfig, load_config
from nodeagent.config.keys import PROGRAM, no_home
from nodeagent.config.loading import read_source
from nodeagent.config.values import absolute
from nodeagent.errors import ConfigError, Problem, StartupError


def find_state_dir(config: Path | None) -> Path:
    """The state folder of the agent that runs with this configuration. Raises ConfigError or StartupError."""
    if config is not None:
        try:
            return load_config(config).state_dir
        except ConfigError as error:
            found = _from_broken(config)
            if found is None or not is_running(found):
                raise error
            return found
    default = default_state_dir()
    if is_running(default):
        return default
    running = [folder for folder in _state_dirs() if is_running(folder)]
    if len(running) > 1:
        places = ", ".join(map(str, running))
        raise StartupError(f"several agents are running (state_dir {places}): name one by --config FILE")
    return running[0] if running else default


def default_state_dir(node_id: str | None = None) -> Path:
    """The state folder of a configuration that names none, for that node or the one called after the host.

    Raises ConfigError if this user has no home folder.
    """
    fields = NodeConfig.model_fields
    node_id = node_id or fields["node_id"].get_default(call_default_factory=True)
    folder = fields["state_dir"].get_default(call_default_factory=True, validated_data={"node_id": node_id})
    assert isinstance(folder, Path)
    if (message := no_home(folder)) is not None:
        raise ConfigError([Problem(message, "state_dir")])
    return folder


def is_running(state_dir: Path) -> bool:
    """Whether an agent holds the lock of this folder now."""
    try:
        with (state_dir / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _state_dirs() -> Iterator[Path]:
    """The folders of this user's agents and demos, by their default places."""
    root = platformdirs.user_state_path()
    yield from sorted(path.parent for path in (root / PROGRAM).glob("*/lock"))
    yield from sorted(path.parent for path in (root / DEMO_APP).glob("*/state/lock"))


def _from_broken(config: Path) -> Path | None:
    """The state folder as far as a configuration with errors tells it."""
    try:
        source = read_source(config)
    except ConfigError:
        return None
    document = source.value
    if not isinstance(document, dict):
        return None
    named, node_id = document.get("state_dir"), document.get("node_id")
    try:
        if named is not None:
            return absolute(named, source.folder)
    except ValueError:
        return None
    return default_state_dir(node_id if isinstance(node_id, str) else None)
