"""The log: lines that can't be forged, and a reader that stops reading and harms nobody."""

import json
import logging
import os
import pty
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from io import FileIO
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from nodeagent import logs
from nodeagent.logs import (
    CLOSE_TIMEOUT_S,
    MESSAGE_CHARS_MAX,
    HumanFormatter,
    JsonFormatter,
    LogSink,
    request_id_var,
)


def record(message: str, *args: object, level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("nodeagent.agent", level, __file__, 1, message, args, None)
    made.__dict__.update(fields)
    return made


def failed_record() -> logging.LogRecord:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        return logging.LogRecord("nodeagent.agent", logging.ERROR, __file__, 1, "it broke", (), sys.exc_info())


# --- What a line looks like -------------------------------------------------------------------------------------


def test_a_json_line_has_the_time_in_utc_with_milliseconds_and_the_fields_that_are_set() -> None:
    made = record("restart in %.1f s", 4.0, device="cpu:0", model="m", generation=7, path="not a field")
    made.created = 1_795_457_231.042
    assert json.loads(JsonFormatter().format(made)) == {
        "time": "2026-11-23T18:07:11.042Z",
        "level": "info",
        "logger": "nodeagent.agent",
        "message": "restart in 4.0 s",
        "device": "cpu:0",
        "model": "m",
        "generation": 7,
    }


def test_a_human_line_has_a_short_time_the_message_and_the_fields_that_are_set() -> None:
    line = HumanFormatter().format(record("ready", device="cpu:0", generation=7))
    assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3} INFO  agent: ready  device=cpu:0 generation=7", line)


@given(st.text())
def test_any_message_is_one_line_of_json_that_reads_back_as_it_was(message: str) -> None:
    line = JsonFormatter().format(record("%s", message))
    assert len(line.splitlines()) == 1
    assert json.loads(line)["message"] == message


@given(st.text())
def test_any_message_and_field_is_one_line_for_a_person(text: str) -> None:
    line = HumanFormatter().format(record("%s", text, model=text))
    assert len(line.splitlines()) == 1
    assert "\x1b" not in line


def test_control_characters_are_spelled_out_for_a_person() -> None:
    line = HumanFormatter().format(record("%s", "a\n12:00:00 ERROR forged\x1b[2J\u202e\u200f"))
    assert r"a\n12:00:00 ERROR forged\x1b[2J\u202e\u200f" in line


def test_the_request_id_of_the_context_is_on_the_line_unless_the_event_names_its_own() -> None:
    token = request_id_var.set("of-the-context")
    try:
        assert json.loads(JsonFormatter().format(record("x")))["request_id"] == "of-the-context"
        assert json.loads(JsonFormatter().format(record("x", request_id="own")))["request_id"] == "own"
    finally:
        request_id_var.reset(token)
    assert "request_id" not in json.loads(JsonFormatter().format(record("x")))


def test_an_exception_is_one_field_of_the_json_line() -> None:
    event = json.loads(JsonFormatter().format(failed_record()))
    assert event["message"] == "it broke"
    assert event["exception"].startswith("Traceback")
    assert event["exception"].endswith("ValueError: first\nsecond")


def test_a_traceback_for_a_person_is_set_in_below_its_event() -> None:
    first, *rest = HumanFormatter().format(failed_record()).splitlines()
    assert first.endswith("agent: it broke")
    assert rest[-1] == "    second"
    assert all(line.startswith("    ") for line in rest)


def test_a_very_long_message_is_cut_and_says_so() -> None:
    message = json.loads(JsonFormatter().format(record("x" * (MESSAGE_CHARS_MAX + 5))))["message"]
    assert message.endswith("x... (5 characters more)")
    assert len(message) < MESSAGE_CHARS_MAX + 100


# As llama-server b10068 printed them, with its own time stamps and without (`--no-log-timestamps`).
CHILD_LINES = [
    ("0.00.006.938 W srv  llama_server: CORS is set to allow all origins ('*') and no API key is set", "warning"),
    ("0.00.008.486 I srv    load_model: loading model '/nonexistent.gguf'", "info"),
    ("0.00.008.833 E gguf_init_from_file: failed to open GGUF file '/nonexistent.gguf'", "error"),
    ("12.59.009.611 E srv  llama_server: exiting due to model loading error", "error"),
    ("0.00.012.345 D srv  update_slots: run slots completed", "debug"),
    ("W srv  llama_server: -----------------", "warning"),
    ("E srv    load_model: failed to load model, '/nonexistent.gguf'", "error"),
    ("ggml_vulkan: No devices found.", "info"),
    ("", "info"),
    ("0.00.008.833 Error is a word", "info"),
    ("Warning: this is no letter", "info"),
    ("a line of its own: 0.00.008.833 E not at the start", "info"),
]


@pytest.mark.parametrize(("line", "level"), CHILD_LINES)
def test_a_servers_line_has_the_level_that_it_names(line: str, level: str) -> None:
    assert logging.getLevelName(logs.child_level(line)) == level.upper()


def test_a_servers_warning_is_a_warning_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    logs.child_line("cpu:0", "tiny", 3, "0.00.009.016 E srv    load_model: failed to load model")
    [logged] = caplog.records
    assert (logged.levelname, logged.getMessage()) == (
        "ERROR",
        "0.00.009.016 E srv    load_model: failed to load model",
    )
    assert (logged.__dict__["device"], logged.__dict__["model"], logged.__dict__["generation"]) == ("cpu:0", "tiny", 3)


# --- The sink ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pipe:
    reader: FileIO
    writer: FileIO

    async def lines(self, count: int) -> list[dict[str, Any]]:
        """Read as many lines as that."""
        data = b""
        while data.count(b"\n") < count:
            chunk = await trio.to_thread.run_sync(self.reader.read, 65536, abandon_on_cancel=True)
            assert chunk, f"the log ended after {data.count(10)} lines"
            data += chunk
        return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    read_fd, write_fd = os.pipe()
    # In this order: to close the read end frees a thread that is blocked in writing.
    with FileIO(write_fd, "w") as writer, FileIO(read_fd) as reader:
        yield Pipe(reader, writer)


def sink_on(pipe: Pipe, capacity: int = 1000) -> LogSink:
    sink = LogSink(pipe.writer.fileno(), capacity=capacity)
    sink.setFormatter(JsonFormatter())
    return sink


async def test_closing_writes_what_waits(pipe: Pipe) -> None:
    sink = sink_on(pipe)
    for n in range(200):
        sink.handle(record("%d", n))
    sink.close()
    with trio.fail_after(5):
        lines = await pipe.lines(200)
    assert [line["message"] for line in lines] == [str(n) for n in range(200)]
    assert sink.dropped == 0


async def test_a_reader_that_comes_back_finds_one_line_in_the_gap_that_counts_what_is_missing(pipe: Pipe) -> None:
    sink = sink_on(pipe, capacity=10)
    handed = 0
    while sink.dropped < 5:
        sink.handle(record("%d %s", handed, "x" * 4000))
        handed += 1
        assert handed < 200, "nothing was dropped although nobody reads"
    kept = handed - sink.dropped
    with trio.fail_after(5):
        lines = await pipe.lines(kept + 1)
        sink.handle(record("after"))
        lines += await pipe.lines(1)
    *before, notice, after = [line["message"] for line in lines]
    assert [int(message.split()[0]) for message in before] == list(range(kept))
    assert notice.startswith("5 log lines were dropped here")
    assert after == "after"
    sink.close()


@pytest.mark.real
def test_closing_gives_up_on_a_reader_that_does_not_read_and_only_once(pipe: Pipe) -> None:
    sink = sink_on(pipe)
    for _ in range(50):
        sink.handle(record("x" * 4000))
    started = time.monotonic()
    sink.close(timeout_s=0.2)
    sink.close(timeout_s=60)
    assert 0.2 <= time.monotonic() - started < 5


@pytest.mark.real
def test_what_is_logged_after_closing_is_dropped_and_counted(pipe: Pipe) -> None:
    sink = sink_on(pipe)
    sink.close()
    sink.handle(record("too late"))
    assert sink.dropped == 1


@pytest.mark.real
def test_lines_for_a_reader_that_is_gone_are_counted_as_dropped(pipe: Pipe) -> None:
    sink = sink_on(pipe)
    pipe.reader.close()
    for _ in range(7):
        sink.handle(record("x"))
    sink.close()
    assert sink.dropped == 7


async def test_a_descriptor_that_someone_made_non_blocking_loses_nothing(pipe: Pipe) -> None:
    os.set_blocking(pipe.writer.fileno(), False)
    sink = sink_on(pipe)
    for n in range(100):
        sink.handle(record("%d %s", n, "x" * 4000))
    with trio.fail_after(10):
        lines = await pipe.lines(100)
    assert [int(line["message"].split()[0]) for line in lines] == list(range(100))
    sink.close()


async def test_a_wrong_log_call_becomes_a_line_that_names_it(pipe: Pipe) -> None:
    sink = sink_on(pipe)
    sink.handle(record("%d servers", "many"))
    with trio.fail_after(5):
        [line] = await pipe.lines(1)
    assert "test_logs.py:1" in line["message"]
    assert "%d servers" in line["message"]
    sink.close()


async def test_bytes_that_are_no_text_in_a_childs_line_reach_the_log(pipe: Pipe) -> None:
    sink = sink_on(pipe)
    sink.handle(record("%s", b"\xff\xfe ok".decode(errors="surrogateescape")))
    with trio.fail_after(5):
        [line] = await pipe.lines(1)
    assert line["message"].endswith(" ok")
    sink.close()


TEXT = "How to use it:\n\n  curl http://127.0.0.1:1\x1b[2J"


@pytest.mark.real
@pytest.mark.parametrize(
    ("formatter", "shown"),
    [(HumanFormatter(), TEXT.replace("\x1b", "\\x1b")), (JsonFormatter(), '"level":"info"')],
    ids=["human", "json"],
)
def test_text_for_a_person_stands_between_the_lines_whatever_the_level(
    pipe: Pipe, formatter: logging.Formatter, shown: str
) -> None:
    sink = sink_on(pipe)
    sink.setFormatter(formatter)
    sink.handle(record("before"))
    sink.show(TEXT)
    sink.handle(record("after"))
    sink.close()
    pipe.writer.close()
    before, *text, after = pipe.reader.readall().decode().splitlines()
    assert "before" in before
    assert shown in "\n".join(text)
    assert "after" in after


# --- A whole process --------------------------------------------------------------------------------------------

ONE_OF_EACH = """
import logging, sys, warnings
from nodeagent import logs

logs.configure(sys.argv[1], "INFO")
logging.getLogger("nodeagent.agent").info("ready")
logging.getLogger("nodeagent.agent").debug("not shown")
logging.getLogger("httpx").info("not shown")
logs.child_line("cpu:0", "tiny", 3, "listening on port 1")
warnings.warn("careful")
"""


async def stderr_of(format: str) -> list[str]:
    with trio.fail_after(30):
        done = await trio.run_process(
            [sys.executable, "-c", ONE_OF_EACH, format], capture_stdout=True, capture_stderr=True
        )
    assert done.stdout == b""
    return done.stderr.decode().splitlines()


@pytest.mark.parametrize("format", ["auto", "json"])
async def test_the_log_of_a_process_is_json_where_stderr_is_no_terminal(format: str) -> None:
    ready, child, warning = [json.loads(line) for line in await stderr_of(format)]
    assert (ready["logger"], ready["message"]) == ("nodeagent.agent", "ready")
    assert (child["logger"], child["message"]) == ("nodeagent.child", "listening on port 1")
    assert (child["device"], child["model"], child["generation"]) == ("cpu:0", "tiny", 3)
    assert (warning["logger"], warning["level"]) == ("py.warnings", "warning")


async def test_a_human_log_can_be_asked_for_anywhere() -> None:
    ready, child, _ = await stderr_of("human")
    assert ready.endswith(" INFO  agent: ready")
    assert child.endswith(" INFO  child: listening on port 1  device=cpu:0 model=tiny generation=3")


async def test_the_log_on_a_terminal_is_for_a_person() -> None:
    terminal, stderr = pty.openpty()
    try:
        with trio.fail_after(30):
            await trio.run_process([sys.executable, "-c", ONE_OF_EACH, "auto"], stderr=stderr)
        assert os.read(terminal, 65536).decode().splitlines()[0].endswith(" INFO  agent: ready")
    finally:
        os.close(stderr)
        os.close(terminal)


FLOOD = """
import json, logging
import trio
from nodeagent import logs

sink = logs.configure("json", "info")
logger = logging.getLogger("nodeagent.flood")
worst_s = 0.0

async def watch():
    global worst_s
    while True:
        before = trio.current_time()
        await trio.sleep(0.005)
        worst_s = max(worst_s, trio.current_time() - before - 0.005)

async def main():
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        for n in range(100_000):
            logger.info("line %d", n)
            if n % 100 == 0:
                await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()

trio.run(main)
print(json.dumps({"worst_s": worst_s, "dropped": sink.dropped}), flush=True)
"""


async def test_a_process_whose_log_nobody_reads_runs_on_and_ends() -> None:
    """It logs 100,000 lines into a pipe that holds some hundreds of them."""
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            process: trio.Process = await nursery.start(
                partial(
                    trio.run_process,
                    [sys.executable, "-c", FLOOD],
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
            assert process.stdout is not None
            said = json.loads(await process.stdout.receive_some())
            # Its lines are out of the way of its end too: stderr still is full, and still nobody reads.
            with trio.fail_after(CLOSE_TIMEOUT_S + 5):
                assert await process.wait() == 0
    assert said["dropped"] > 90_000
    # Blocked in a write it would be infinite; the rest is what a busy machine adds.
    assert said["worst_s"] < 1.0
