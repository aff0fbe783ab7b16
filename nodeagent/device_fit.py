"""Why a model is where it is: how it fits on one device, for people and programs. Pure."""

from typing import Any

import msgspec

from nodeagent.llama_server.fit import Fit, readable
from nodeagent.llama_server.reason_codes import ReasonCode
from nodeagent.scheduling.seam import Obstacle, ServerState, ServerView
from nodeagent.status import DeviceFit, FitState

_OBSTACLES_OF_ROOM = {ReasonCode.DOES_NOT_FIT, ReasonCode.OUT_OF_DEVICE_MEMORY, ReasonCode.NO_ROOM_BESIDE_PINNED}


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one model on one device.

    `server` is its server there; `why_loaded` who asked for its load. `free_bytes` of the device's memory are free, and
    `most_bytes` once all models that may go are gone (both without the reserve; None: unknown). `has_place`: fewer
    models run there than may. `offloads_in_part`: if not all of the model fits, its server leaves a part in the host's
    memory.
    """

    device_id: str
    fit: Fit | None
    server: ServerView[Any] | None
    obstacle: Obstacle | None
    why_loaded: str | None
    free_bytes: int | None
    most_bytes: int | None
    has_place: bool
    offloads_in_part: bool


def device_fit(facts: Facts) -> DeviceFit:
    """How the model fits on the device, or why it is loaded there."""
    fit, server = facts.fit, facts.server
    needed = fit.needed_bytes if fit is not None and fit.needed_bytes else None
    runs = server is not None and server.is_active
    state, why = _loaded(facts, server) if server is not None and runs else _not_loaded(facts, needed)
    return DeviceFit(
        device_id=facts.device_id,
        state=state,
        why=why,
        needed_bytes=needed,
        taken_bytes=needed if runs else None,
        is_measured=fit is not None and fit.measured,
    )


def _loaded(facts: Facts, server: ServerView[Any]) -> tuple[FitState, str]:
    why = facts.why_loaded or "not known"
    if server.pinned:
        why += ", pinned"
    if server.state is ServerState.READY:
        return FitState.LOADED, why
    return FitState.LOADING, f"{server.state.value.replace('_', ' ')}: {server.reason or why}"


def _not_loaded(facts: Facts, needed: int | None) -> tuple[FitState, str]:
    if facts.obstacle is not None:
        is_too_large = facts.obstacle.reason_code in _OBSTACLES_OF_ROOM
        return FitState.DOES_NOT_FIT if is_too_large else FitState.FAILED, facts.obstacle.reason
    if needed is None:
        return FitState.UNKNOWN, "what it needs is not known"
    about = "" if facts.fit is not None and facts.fit.measured else "about "
    said = f"needs {about}{readable(needed)}"
    if facts.free_bytes is None or facts.most_bytes is None:
        return FitState.UNKNOWN, f"{said}; the free memory is not known"
    said += f", {readable(facts.free_bytes)} free"
    if needed <= facts.free_bytes and facts.has_place:
        return FitState.FITS, said
    if needed <= facts.free_bytes:
        return FitState.NEEDS_ROOM, f"{said}; another model has to give way to it, since no more may be loaded"
    if needed <= facts.most_bytes:
        return FitState.NEEDS_ROOM, f"{said}; other models have to give way to it"
    if facts.offloads_in_part:
        return FitState.FITS_IN_PART, f"{said}; a part of it stays in the host's memory"
    return FitState.DOES_NOT_FIT, f"{said}, and {readable(facts.most_bytes)} without the other models"
