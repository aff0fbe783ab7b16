"""What the front asks of the rest of the node."""

from dataclasses import dataclass
from typing import Protocol

from nodeagent.scheduling.scheduler import Scheduler
from nodeagent.status import NodeState
from nodeagent.upstream import Upstream


@dataclass(frozen=True, slots=True)
class ModelCard:
    """A model as `/v1/models` lists it. `created` is in seconds since the epoch, as OpenAI has it."""

    model_id: str
    aliases: tuple[str, ...]
    created: int


class Node(Protocol):
    """The node behind the front."""

    @property
    def node_id(self) -> str: ...

    @property
    def max_request_bytes(self) -> int: ...

    @property
    def scheduler(self) -> Scheduler[Upstream]: ...

    def cards(self) -> list[ModelCard]:
        """Every configured model, in the configuration's order."""

    def state(self) -> NodeState:
        """The node's word of state, with its reasons."""

    def inventory_json(self) -> bytes:
        """The inventory: what registration and heartbeat say, with the facts of the configuration."""
