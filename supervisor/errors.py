"""What can go wrong, as exceptions.

SupervisorError
├── StartFailed         one attempt to start a child failed
├── GivenUp             the child failed too often; starting it is refused for a while
├── NotReady            raised by probes: the child does not answer as it should
│   └── Suspended       a stop signal holds the child, so it can't answer
└── ProbeUnavailable    raised by probes: nothing can be said of the child, since this process lacks something
"""

from supervisor.lifecycle import Exit


class SupervisorError(Exception):
    """The root of the supervisor's exceptions."""


class StartFailed(SupervisorError):
    """This attempt to start the child failed. Its restart policy decides what happens next."""

    def __init__(self, child_id: str, generation: int, exit: Exit) -> None:
        self.child_id = child_id
        self.generation = generation
        self.exit = exit
        super().__init__(f"{child_id} (generation {generation}): {exit.reason}")


class GivenUp(SupervisorError):
    """The child failed too often and can't be started before `retry_at` (`trio.current_time()`)."""

    def __init__(self, child_id: str, reason: str, retry_at: float) -> None:
        self.child_id = child_id
        self.reason = reason
        self.retry_at = retry_at
        super().__init__(f"{child_id}: {reason}")


class NotReady(SupervisorError):
    """Raised by a probe when the child does not answer as it should; the message says what is wrong, for people."""


class Suspended(NotReady):
    """A stop signal (SIGSTOP) holds the child."""


class ProbeUnavailable(SupervisorError):
    """Raised by a probe that could not ask, because this process is out of file descriptors or memory, say.

    It counts neither for the child nor against it. The message says what is lacking, for people.
    """
