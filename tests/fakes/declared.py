"""An entry of `devices` in a configuration, without the configuration."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Declared:
    device_id: str
    threads: int | None = None
    cpus: frozenset[int] | None = None
    llama_server_bin: str | None = None
    env: Mapping[str, str] = field(default_factory=dict)
