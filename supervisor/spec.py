"""What a child is and how to keep it alive: frozen values, decided before anything runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from supervisor.probe import LivenessPolicy, Probe
from supervisor.restart import RestartPolicy


@dataclass(frozen=True, slots=True)
class StopPolicy:
    """SIGTERM to the child's process group; after `grace_s` seconds, SIGKILL to the group."""

    grace_s: float = 5.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSpec:
    """One child to supervise. Durations are in seconds.

    `group` names the children that share one rising series of generation numbers. `env` is the complete environment.
    `probe` says whether the child is ready, and later whether it is still well. A child that is not ready
    `start_timeout_s` after its spawn is ended, and that start has failed; until then the probe runs at least every
    `probe_interval_s`. `cpus` are the CPUs that the child may run on (Linux only), None for all.
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
