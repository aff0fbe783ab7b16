"""Errors that nobody foresaw, and shortages of our own, in virtual time: the supervisor and the other children live."""

import errno
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from fakes.child_process import FakeSpawner, Fate, FateProbe
from supervisor.containment import Containment, own_shortage
from supervisor.errors import NotReady, ProbeUnavailable, StartFailed
from supervisor.lifecycle import Cause, Event, Exited, GaveUp, Ready, Restarting, Started, Unhealthy
from supervisor.probe import LivenessPolicy, ProcessView
from supervisor.records import Records
from supervisor.restart import RestartPolicy
from supervisor.snapshot import ChildState
from supervisor.spec import ChildSpec
from supervisor.supervisor import Supervisor

ERRORS = [
    RuntimeError("unforeseen"),
    RecursionError("too deep"),
    OverflowError("too large"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
]
every_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
LIVENESS = LivenessPolicy(interval_s=5.0, timeout_s=2.0, failures=3)
OUT_OF_FILES = OSError(errno.EMFILE, "Too many open files")


class BrokenProbe(FateProbe):
    """Raises what it is given for the child "broken"."""

    def __init__(self) -> None:
        super().__init__()
        self.error: Exception | None = None

    async def check(self, process: ProcessView) -> str:
        if self.error is not None and str(process).startswith("broken "):
            self.called_at.append(trio.current_time())
            raise self.error
        return await super().check(process)


class BrokenRecords(Records):
    """Can't look at the process of the child "broken", whose pid is 102."""

    def __init__(self, path: Path, error: Exception) -> None:
        super().__init__(path)
        self._error = error

    def add(self, pid: int, argv: tuple[str, ...]) -> None:
        if pid == 102:
            raise self._error


class Two:
    """A supervisor with the child "sound", which must stay ready, and the child "broken"."""

    def __init__(self, *fates: Fate | Exception, **more: Any) -> None:
        self.events: list[Event] = []
        self.probe = BrokenProbe()
        self.spawner = FakeSpawner([Fate(), *fates])
        self.on_event: Callable[[Event], None] = lambda _event: None
        self.supervisor = Supervisor(on_event=self._record, spawner=self.spawner, **more)

    def _record(self, event: Event) -> None:
        self.events.append(event)
        if event.child_id == "broken":
            self.on_event(event)

    async def start(self, child_id: str = "broken", **more: Any) -> Ready:
        facts: dict[str, Any] = {"group": "group", "argv": ("program",), "env": {}, "start_timeout_s": 30.0}
        facts |= {"liveness": LIVENESS, "restart": RestartPolicy(max_restarts=1, cooldown_s=100.0)}
        return await self.supervisor.start(ChildSpec(child_id=child_id, probe=self.probe, **(facts | more)))

    async def fails_to_start(self, **more: Any) -> StartFailed:
        with pytest.raises(StartFailed) as failed:
            await self.start(**more)
        return failed.value

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind) and event.child_id == "broken"]

    @property
    def state(self) -> ChildState:
        return self.supervisor.snapshot()["broken"].state


async def watch(nursery: trio.Nursery, *fates: Fate | Exception, **more: Any) -> Two:
    two = Two(*fates, **more)
    await nursery.start(two.supervisor.run)
    await two.start("sound")
    return two


@contextmanager
def the_other_child_stays_ready(two: Two) -> Iterator[None]:
    yield
    sound = two.supervisor.snapshot()["sound"]
    assert (sound.state, sound.generation) == (ChildState.READY, 1)
    assert "sound" in two.spawner.running


# Unforeseen errors


@every_error
async def test_an_error_in_a_spawn_fails_that_start(
    error: Exception, autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    two = await watch(nursery, error, error)
    with the_other_child_stays_ready(two):
        failed = await two.fails_to_start()
        assert failed.exit.cause is Cause.SPAWN_FAILED
        assert failed.exit.reason.startswith("could not be spawned: ")
        await two.fails_to_start()
        assert two.state is ChildState.FAILED
    assert caplog.text.count("Traceback") == (0 if isinstance(error, ValueError) else 1)


@every_error
async def test_an_error_in_a_probe_fails_a_start_at_once(
    error: Exception, autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    two = await watch(nursery)
    two.probe.error = error
    with the_other_child_stays_ready(two):
        failed = await two.fails_to_start()
        assert trio.current_time() == 0.0
        assert failed.exit.cause is Cause.INTERNAL_ERROR
        assert f"unexpected error in its probe: {type(error).__name__}" in failed.exit.reason
        await two.fails_to_start()
        assert two.state is ChildState.FAILED
        assert two.spawner.running == {"sound"}
    assert caplog.text.count("Traceback") == 1


@every_error
async def test_an_error_in_a_probe_of_a_ready_child_is_one_failed_probe(
    error: Exception, autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    two = await watch(nursery)
    with the_other_child_stays_ready(two):
        await two.start()
        two.probe.error = error
        await trio.sleep(11.0)
        assert two.state is ChildState.READY
        await trio.sleep(4.5)
        [unhealthy] = two.of(Unhealthy)
        assert (unhealthy.at, unhealthy.cause) == (15.0, Cause.LIVENESS_FAILED)
        assert type(error).__name__ in unhealthy.reason
    assert caplog.text.count("Traceback") <= 2  # its next generation fails to start


@every_error
@pytest.mark.parametrize("ready_after_s", [0.0, None], ids=["ready", "starting"])
async def test_an_error_in_the_handler_of_output_fails_that_generation(
    error: Exception,
    ready_after_s: float | None,
    autojump_clock: MockClock,
    nursery: trio.Nursery,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def on_line(child_id: str, _generation: int, _line: str) -> None:
        if child_id == "broken":
            raise error

    two = await watch(nursery, Fate(ready_after_s=ready_after_s), on_line=on_line)
    with the_other_child_stays_ready(two):
        nursery.start_soon(ignoring_failure, two.start)
        await trio.testing.wait_all_tasks_blocked()
        for process in two.spawner.processes:
            process.output.feed(b"one\ntwo\n")
        await trio.testing.wait_all_tasks_blocked()
        [exited] = two.of(Exited)
        assert exited.exit.cause is Cause.INTERNAL_ERROR
        assert two.of(Restarting)[0].cause is Cause.INTERNAL_ERROR
        assert len(two.of(Unhealthy)) == (0 if ready_after_s is None else 1)
    assert caplog.text.count("Traceback") == 1


async def ignoring_failure(start: Callable[[], Awaitable[Ready]]) -> None:
    with suppress(StartFailed):
        await start()


@every_error
@pytest.mark.parametrize("kind", [Started, Ready, Unhealthy, Exited, Restarting, GaveUp])
async def test_an_error_in_the_handler_of_an_event_ends_that_child_at_most(
    error: Exception, kind: type[Event], autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    two = await watch(nursery, Fate(ill_after_s=1.0), Fate(ill_after_s=1.0))

    def on_event(event: Event) -> None:
        if isinstance(event, kind):
            raise error

    two.on_event = on_event
    with the_other_child_stays_ready(two):
        with trio.move_on_after(1000):
            await ignoring_failure(two.start)
            await trio.sleep_forever()
        assert two.state is ChildState.FAILED
        assert two.spawner.running == {"sound"}
        causes = {exited.exit.cause for exited in two.of(Exited)}
        assert causes == {Cause.INTERNAL_ERROR if kind in (Started, Ready) else Cause.LIVENESS_FAILED}


@every_error
async def test_an_error_in_the_records_fails_that_generation_and_its_events_are_still_passed_on(
    error: Exception, autojump_clock: MockClock, nursery: trio.Nursery, tmp_path: Path
) -> None:
    two = await watch(nursery, records=BrokenRecords(tmp_path / "children.json", error))
    with the_other_child_stays_ready(two):
        failed = await two.fails_to_start()
        assert failed.exit.cause is Cause.INTERNAL_ERROR
        assert len(two.of(Started)) == 1


@every_error
@pytest.mark.parametrize("method", ["reap_strays", "attend", "terminate"])
async def test_an_error_while_a_process_is_attended_or_cleaned_up_ends_that_child_only(
    error: Exception, method: str, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    fate = Fate(exits_after_s=10.0, broken_by={method: error})
    two = await watch(nursery, fate, fate)
    with the_other_child_stays_ready(two):
        with trio.move_on_after(1000):
            await ignoring_failure(two.start)
            await trio.sleep_forever()
        assert two.state is ChildState.FAILED
        assert len(two.of(Exited)) == 2


@every_error
async def test_an_error_in_the_supervision_itself_fails_that_child(
    error: Exception, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    class BrokenRandom(random.Random):
        def uniform(self, _a: float, _b: float) -> float:
            raise error

    two = await watch(nursery, Fate(ready_after_s=None, exits_after_s=1.0), rng=BrokenRandom())
    with the_other_child_stays_ready(two):
        failed = await two.fails_to_start()
        assert failed.exit.cause is Cause.INTERNAL_ERROR
        assert two.state is ChildState.FAILED
        assert [event.cause for event in two.of(GaveUp)] == [Cause.INTERNAL_ERROR]
        assert (await two.start()).generation == 3


@every_error
def test_a_traceback_is_logged_once_for_each_place_and_kind(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    it = Containment("child")
    for place in ("a probe", "a probe", "a spawn", "a probe"):
        with it.contained(place):
            raise error
    assert caplog.text.count("Traceback") == 2


async def test_a_cancellation_beside_an_error_goes_on(autojump_clock: MockClock) -> None:
    errors: list[Exception] = []

    async def fails_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise RuntimeError("unforeseen")

    with trio.CancelScope() as scope, Containment("child").contained("a test", errors.append):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails_when_cancelled)
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.sleep_forever()
    assert [str(error) for error in errors] == ["unforeseen"]


# Our own shortages


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN])
async def test_a_spawn_that_we_had_nothing_left_for_is_retried_with_back_off_and_never_counts(
    code: int, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    two = await watch(nursery, *[OSError(code, "no more")] * 12)
    with the_other_child_stays_ready(two):
        failed = await two.fails_to_start()
        assert failed.exit.cause is Cause.OWN_SHORTAGE
        assert len(two.of(Restarting)) == 1
        await trio.sleep(1000)
        assert two.state is ChildState.READY
        assert two.of(GaveUp) == []
        delays = [event.delay_s for event in two.of(Restarting)]
        assert len(delays) == 12
        assert delays[0] <= 1.0 < delays[2] < delays[5]


def unavailable(kind: str) -> Exception:
    """A probe's error for want of a file descriptor, as it comes from different libraries."""
    if kind == "said so":
        return ProbeUnavailable("out of file descriptors")
    if kind == "memory":
        return MemoryError()
    if kind == "raw":
        return OUT_OF_FILES
    if kind == "group":
        return ExceptionGroup("attempts", [OUT_OF_FILES])
    try:
        try:
            raise OUT_OF_FILES
        except OSError as error:
            raise ConnectionError("all attempts failed") from error
    except ConnectionError as error:
        wrapped = NotReady("/health failed")
        wrapped.__cause__ = error
        return wrapped


KINDS = ["said so", "memory", "raw", "group", "wrapped"]


@pytest.mark.parametrize("kind", KINDS)
async def test_a_liveness_probe_that_could_not_ask_is_no_failure_of_the_child(
    kind: str, autojump_clock: MockClock, nursery: trio.Nursery, caplog: pytest.LogCaptureFixture
) -> None:
    two = await watch(nursery)
    await two.start()
    two.probe.error = unavailable(kind)
    await trio.sleep(300.0)
    assert two.state is ChildState.READY
    assert two.of(Unhealthy) == []
    assert 4 <= caplog.text.count("can't be probed") <= 6  # once a minute
    two.probe.error = NotReady("ill")
    await trio.sleep(16.0)
    assert len(two.of(Unhealthy)) == 1


@pytest.mark.parametrize("kind", KINDS)
async def test_a_start_that_could_not_be_probed_does_not_count(
    kind: str, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    two = await watch(nursery)
    two.probe.error = unavailable(kind)
    failed = await two.fails_to_start()
    assert trio.current_time() == 30.0
    assert failed.exit.cause is Cause.OWN_SHORTAGE
    await trio.sleep(1000)
    assert two.of(GaveUp) == []
    two.probe.error = None
    await trio.sleep(100)
    assert two.state is ChildState.READY


def test_a_full_queue_of_a_childs_socket_is_no_shortage_of_ours() -> None:
    full = OSError(errno.EAGAIN, "Resource temporarily unavailable")
    assert own_shortage(full) is None
    assert own_shortage(full, while_spawning=True) == "this user is out of processes"
    assert own_shortage(ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")) is None


def test_errors_that_cause_each_other_are_looked_at_once() -> None:
    first, second = RuntimeError("first"), RuntimeError("second")
    first.__cause__, second.__cause__ = second, first
    assert own_shortage(first) is None


# Out of memory


async def test_a_child_that_the_kernel_killed_for_memory_is_given_up_on_until_the_cool_down_is_over(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    two = await watch(nursery, Fate(exits_after_s=3.0, code=-9, out_of_memory="limit 536870912 bytes"), Fate())
    with the_other_child_stays_ready(two):
        await two.start()
        await trio.sleep(50.0)
        [gave_up] = two.of(GaveUp)
        assert gave_up.cause is Cause.OUT_OF_MEMORY
        assert gave_up.reason == (
            "out of memory (limit 536870912 bytes): it was killed by SIGKILL; not restarted with the same arguments"
        )
        assert (gave_up.at, gave_up.retry_at) == (3.0, 103.0)
        await trio.sleep(60.0)
        assert (await two.start()).generation == 3


@pytest.mark.parametrize(
    ("code", "line", "cause"),
    [
        (
            1,
            b"ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory\n",
            Cause.OUT_OF_DEVICE_MEMORY,
        ),
        (1, b"llama_model_load: error loading model: unable to allocate CUDA0 buffer\n", Cause.OUT_OF_DEVICE_MEMORY),
        (1, b"alloc_tensor_range: failed to allocate Vulkan0 buffer of size 1\n", Cause.OUT_OF_DEVICE_MEMORY),
        (1, b"alloc_tensor_range: failed to allocate CPU buffer of size 1\n", Cause.OUT_OF_MEMORY),
        (-6, b"terminate called after throwing an instance of 'std::bad_alloc'\n", Cause.OUT_OF_MEMORY),
        (0, b"out of memory\n", Cause.EXITED),
        (1, b"model not found\n", Cause.EXITED),
        (-9, b"all is well\n", Cause.KILLED_BY_SIGNAL),
    ],
)
async def test_a_child_that_says_that_memory_ran_out_and_exits_is_out_of_memory(
    code: int, line: bytes, cause: Cause, autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    two = await watch(nursery, Fate(exits_after_s=3.0, code=code))
    await two.start()
    two.spawner.processes[1].output.feed(line)
    await trio.sleep(3.0)
    await trio.testing.wait_all_tasks_blocked()
    [exited] = two.of(Exited)
    assert exited.exit.cause is cause
    assert line.decode().strip() not in exited.exit.reason


async def test_a_child_that_we_ended_is_not_out_of_memory(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    two = await watch(nursery, Fate(ignores_sigterm=True, out_of_memory="limit 1 bytes"))
    await two.start()
    await two.supervisor.stop("broken")
    assert two.of(Exited)[0].exit.cause is Cause.STOPPED
