"""A server as scheduling sees it, made from the supervisor's snapshot of the child. Pure."""

from collections.abc import Callable, Sequence

from nodeagent.config import ModelConfig
from nodeagent.llama_server.last_words import last_words
from nodeagent.llama_server.reason_codes import ReasonCode
from nodeagent.llama_server.relay import Upstream
from nodeagent.scheduling.seam import ServerState, ServerView
from supervisor.snapshot import ChildSnapshot, ChildState

_STATES = {
    ChildState.STARTING: ServerState.STARTING,
    ChildState.READY: ServerState.READY,
    ChildState.UNHEALTHY: ServerState.UNHEALTHY,
    ChildState.STOPPING: ServerState.STOPPING,
    ChildState.BACKING_OFF: ServerState.BACKING_OFF,
    ChildState.FAILED: ServerState.FAILED,
}


def view_of_unusable_model(model: ModelConfig, problem: str, now: float) -> ServerView[Upstream]:
    """The failed server of a model that has no child, since its file can't be used."""
    return ServerView(
        model_id=model.model_id,
        state=ServerState.FAILED,
        generation=0,
        since=now,
        slots=model.parallel,
        reason=problem,
        reason_code=ReasonCode.MODEL_FILE_UNUSABLE,
    )


def view_of_child(
    model_id: str,
    model: ModelConfig | None,
    child: ChildSnapshot,
    upstream: Upstream | None,
    *,
    last_lines: tuple[str, ...] = (),
    still_starting: bool,
) -> ServerView[Upstream]:
    """The server of a child that is not stopped. `model` is None if it is no longer configured; `last_lines` are
    those of `last_lines_of`. With `still_starting` a child that is ready counts as starting."""
    state = _STATES[child.state]
    if state is ServerState.READY and still_starting:
        state = ServerState.STARTING
    return ServerView(
        model_id=model_id,
        state=state,
        generation=child.generation,
        since=child.since,
        slots=model.parallel if model is not None else 1,
        spawned_at=child.spawned_at,
        reason=child.reason,
        reason_code=code_of(child),
        last_lines=last_lines,
        retry_at=child.retry_at,
        endpoint=upstream if state is ServerState.READY else None,
        idle_unload_s=model.idle_unload_s if model is not None else None,
        pinned=model is not None and model.pinned,
        returns=model is not None and (model.preload or model.default),
        slot_ctx_size=upstream.slot_ctx_size if upstream is not None else None,
    )


def code_of(child: ChildSnapshot) -> ReasonCode | None:
    """Why the child is unhealthy, backing off or failed."""
    return None if child.cause is None else ReasonCode(child.cause.value)


def last_lines_of(
    child: ChildSnapshot, lines: Callable[[], Sequence[str]], argv: Sequence[str] = ()
) -> tuple[str, ...]:
    """Of what a child that has ended printed last, what says why; nothing of any other. `argv` is its command line."""
    ended = child.state in (ChildState.BACKING_OFF, ChildState.FAILED)
    return tuple(last_words(lines(), argv)) if ended and child.reason is not None else ()
