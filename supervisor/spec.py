"""What a child is and how it is to be kept: frozen values, decided before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from supervisor.probe import Probe
from supervisor.restart import RestartPolicy


@dataclass(frozen=True, slots=True)
class StopPolicy:
    """SIGTERM to the child's process group, `grace_s` seconds to obey it, then SIGKILL to the group."""

    grace_s: float = 5.0


@dataclass(frozen=True, slots=True)
class LivenessPolicy:
    """A ready child is probed each `interval_s`; `failures` probes in a row that fail, or take longer than
    `timeout_s`, make it unhealthy, and it is replaced."""

    interval_s: float = 5.0
    timeout_s: float = 5.0
    failures: int = 3


@dataclass(frozen=True, slots=True)
class ChildSpec:
    """One child to supervise. Durations in seconds.

    `group` names the children that share one rising series of generation numbers. `env` is the whole environment.
    `probe` says when the child is ready and whether it is well. A start that is not ready `start_timeout_s` after its
    spawn is stopped and counts as failed; while it lasts, probes are at most `probe_interval_s` apart. `cpus` are the
    CPUs that it may run on (Linux only), None for all.
    """

    child_id: str
    group: str
    argv: tuple[str, ...]
    env: Mapping[str, str]
    probe: Probe
    start_timeout_s: float
    probe_interval_s: float = 0.5
    cpus: frozenset[int] | None = None
    cwd: Path | None = None
    liveness: LivenessPolicy = field(default_factory=LivenessPolicy)
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    stop: StopPolicy = field(default_factory=StopPolicy)
