"""Why a server is not ready or a device can't serve a model, as codes for programs."""

from enum import StrEnum

from supervisor.lifecycle import Cause


class ReasonCode(StrEnum):
    """The closed set of `ServerView.reason_code` and `Obstacle.reason_code`: each `Cause` of the supervisor, and what
    the agent itself finds before it starts a server. The `reason` beside it is for people."""

    EXITED = Cause.EXITED.value
    KILLED_BY_SIGNAL = Cause.KILLED_BY_SIGNAL.value
    SPAWN_FAILED = Cause.SPAWN_FAILED.value
    START_TIMEOUT = Cause.START_TIMEOUT.value
    LIVENESS_FAILED = Cause.LIVENESS_FAILED.value
    SUSPENDED = Cause.SUSPENDED.value
    STALLED = Cause.STALLED.value
    STOPPED = Cause.STOPPED.value
    OUT_OF_MEMORY = Cause.OUT_OF_MEMORY.value
    OUT_OF_DEVICE_MEMORY = Cause.OUT_OF_DEVICE_MEMORY.value
    OWN_SHORTAGE = Cause.OWN_SHORTAGE.value
    INTERNAL_ERROR = Cause.INTERNAL_ERROR.value
    MODEL_FILE_UNUSABLE = "model_file_unusable"
    """The model's file is missing, damaged, or could not be read."""
    DOES_NOT_FIT = "does_not_fit"
    """The model needs more memory than the device has."""
    NO_ROOM_BESIDE_PINNED = "no_room_beside_pinned"
    """The models with `pinned` that are loaded leave no place or memory for the model."""
    KEPT_ELSEWHERE = "kept_elsewhere"
    """The model's `devices` keep it to another device, or to several together."""
    NOT_CONFIGURED = "not_configured"
    """The configuration was reloaded, and no longer has the model."""
