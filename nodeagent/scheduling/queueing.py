"""The pure choice of what a lane does next: grant a waiting request, load a model, or wait.

First come, first served. The head of the queue decides; requests behind it run beside it only when they want the
same model and it has slots left. So models alternate in the order in which they were asked for, and nobody starves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ServerUse:
    """A server of the device as the policy sees it. `slots` is how many requests it may serve at once; `held`, that
    it is being unloaded, and nothing more may be granted on it."""

    ready: bool
    slots: int
    in_flight: int
    held: bool = False


@dataclass(frozen=True, slots=True)
class Grant:
    """Let the waiting request at `index` run now."""

    index: int
    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """Make the device's server run `model_id`; nothing is in flight on any other."""

    model_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing until something changes."""

    reason: str


Decision = Grant | Load | Wait


def decide(waiting: Sequence[str], servers: Mapping[str, ServerUse], loading: str | None) -> Decision:
    """Choose the lane's next step.

    `waiting` are the model ids that the queued requests want, the oldest first. `servers` maps a model id to its
    server on this device, if there is one. `loading` is the model that is being made ready now, None if none is.
    """
    if not waiting:
        return Wait("nobody waits")
    wanted = waiting[0]
    server = servers.get(wanted)
    if server is not None and server.held:
        return Wait(f"{wanted} is being unloaded")
    if server is not None and server.ready:
        if server.in_flight < server.slots:
            return Grant(0, f"{wanted} is ready with {server.slots - server.in_flight} of {server.slots} slots free")
        return Wait(f"all {server.slots} slots of {wanted} are in use")
    busy = [model_id for model_id, use in servers.items() if model_id != wanted and use.in_flight]
    if busy:
        return Wait(f"{busy[0]} is still in use; {wanted} is loaded after it")
    if loading == wanted:
        return Wait(f"{wanted} is loading")
    return Load(wanted, "the oldest request wants it" + (f", and no longer {loading}" if loading else ""))
