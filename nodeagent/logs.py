"""The agent's log: one line per event on stderr, for a person or as JSON, that can never block the event loop.

The reader of our stderr may stop reading (a paused terminal, a stuck log collector); a write to it then blocks,
and with it everything. So the task that logs an event formats its line, and a daemon thread writes the lines.
Lines that don't fit between the two are dropped and counted, and a line in the gap says how many.

Events carry fields by `extra={"device": ..., "generation": ...}`; FIELDS names those that are shown. A line has the
request id of its context, so that callers don't pass it along.
"""

import atexit
import json
import logging
import os
import re
import select
import threading
from collections import deque
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Final, Literal

import msgspec

from nodeagent.timestamps import rfc3339

LogFormat = Literal["auto", "human", "json"]

request_id_var: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Set by the front for as long as it handles a request."""

FIELDS: Final = ("child", "device", "model", "generation", "request_id")

# Together they bound the memory of a log that nobody reads: 4096 lines of 8 Ki characters are some 32 MiB at the most.
QUEUED_LINES_MAX: Final = 4096
MESSAGE_CHARS_MAX: Final = 8192
# The end of a traceback is the part that says what happened.
EXCEPTION_CHARS_MAX: Final = 8192
LINES_PER_WRITE: Final = 64
CLOSE_TIMEOUT_S: Final = 1.0

# Characters that could forge a line, move a terminal's cursor, or reorder the text around them; a tab is harmless.
_UNSAFE: Final = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

# They log each request at INFO, and the agent probes its children several times a second.
_CHATTY: Final = ("httpx", "httpcore")

# A field may hold a path.
_ENCODER: Final = msgspec.json.Encoder(enc_hook=str)

# How llama-server starts a line: minutes, seconds, milliseconds and microseconds since its start (unless its flags
# turn them off), then the level's letter. Lines without a letter continue the one before or come from a library.
_CHILD_LEVEL: Final = re.compile(r"(?:\d+\.\d{2}\.\d{3}\.\d{3} )?([DIWE]) ")
_CHILD_LEVELS: Final = {"D": logging.DEBUG, "I": logging.INFO, "W": logging.WARNING, "E": logging.ERROR}

_child_logger = logging.getLogger("nodeagent.child")


def configure(format: LogFormat = "auto", level: str = "info", *, fd: int = 2) -> "LogSink":
    """Send every logger of the process to `fd`; python's warnings too.

    `auto` is `human` where `fd` is a terminal, else `json`. `level` is one of logging's names, in any case. Calling
    again replaces the earlier sink. The sink is closed at exit; close it yourself before an `os._exit`.
    """
    human = format == "human" or (format == "auto" and os.isatty(fd))
    sink = LogSink(fd)
    sink.setFormatter(HumanFormatter() if human else JsonFormatter())
    root = logging.getLogger()
    for old in [handler for handler in root.handlers if isinstance(handler, LogSink)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(sink)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
    for name in _CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
    atexit.register(sink.close)
    return sink


def printable(text: str) -> str:
    """The text with control characters escaped: it can't move a terminal's cursor or forge a line."""
    return _UNSAFE.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def child_line(device_id: str, model_id: str, generation: int, line: str) -> None:
    """Log one line that a server printed, at the level that the line gives itself."""
    level = child_level(line)
    if _child_logger.isEnabledFor(level):
        # Not by `log`, which looks up its caller for each line.
        record = _own_record(level, line, _child_logger.name)
        record.__dict__ |= {"device": device_id, "model": model_id, "generation": generation}
        _child_logger.handle(record)


def child_level(line: str) -> int:
    """The level of one line of llama-server's log; INFO where it names none."""
    found = _CHILD_LEVEL.match(line)
    return _CHILD_LEVELS[found[1]] if found else logging.INFO


class LogSink(logging.Handler):
    """Writes lines to a file descriptor from a thread of its own; `emit` never waits for the reader.

    When `capacity` lines are queued, later lines are dropped until the queue has been written: then one line, in the
    gap, says how many are missing. `dropped` counts them for the life of the sink.
    Not a QueueHandler with a QueueListener: the listener's `stop()` waits without limit for a sink that is blocked,
    and can't even request the end when the queue is full.
    """

    def __init__(self, fd: int, *, capacity: int = QUEUED_LINES_MAX) -> None:
        super().__init__()
        self.dropped = 0
        self._fd = fd
        self._capacity = capacity
        # _changed guards all that follows; no thread writes or formats while it holds it.
        self._changed = threading.Condition()
        self._lines: deque[str] = deque()
        self._gap = 0
        self._closing = False
        # A daemon thread: while it is blocked in a write, it must not keep the process from ending.
        self._thread = threading.Thread(target=self._write_lines, name="log", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        with self._changed:
            if self._gap or self._closing or len(self._lines) >= self._capacity:
                self._gap += 1
                self.dropped += 1
                return
        line = self._line(record)  # there still is room: logging calls us from one thread at a time
        with self._changed:
            self._lines.append(line)
            self._changed.notify()

    def show(self, text: str) -> None:
        """Put text for a person between the events, whatever the level: as it is in a human log, else one event."""
        record = _own_record(logging.INFO, text)
        record.__dict__[_SHOWN] = True
        self.handle(record)

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Write the queued lines for at most `timeout_s`; later ones are dropped. A second call does nothing."""
        with self._changed:
            if self._closing:  # logging closes its handlers at exit once more: waiting twice would be twice as long
                return
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)
        super().close()

    def _line(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception as error:  # a log call with wrong arguments must not end the task that made it
            where = f"{record.filename}:{record.lineno}"
            return self.format(_own_record(logging.ERROR, f"unusable log call at {where}: {error!r}: {record.msg!r}"))

    def _write_lines(self) -> None:
        while batch := self._next_batch():
            # Straight to the descriptor: a thread that is blocked inside sys.stderr would hold its lock, on which
            # the interpreter aborts at exit.
            data = "".join(line + "\n" for line in batch).encode(errors="backslashreplace")
            if not _write_all(self._fd, data):
                with self._changed:
                    self.dropped += len(batch)

    def _next_batch(self) -> list[str]:
        """Wait for lines; empty when closed and all are written."""
        with self._changed:
            self._changed.wait_for(lambda: self._lines or self._gap or self._closing)
            if self._lines:
                return [self._lines.popleft() for _ in range(min(LINES_PER_WRITE, len(self._lines)))]
            missing, self._gap = self._gap, 0
        if missing:
            text = f"{missing} log lines were dropped here: the log was not read fast enough"
            return [self.format(_own_record(logging.WARNING, text))]
        return []


# Marks a record of `LogSink.show`.
_SHOWN: Final = "_nodeagent_shown"


def _own_record(level: int, message: str, logger: str = __name__) -> logging.LogRecord:
    return logging.LogRecord(logger, level, __file__, 0, message, None, None)


def _write_all(fd: int, data: bytes) -> bool:
    """Write it all, however long that takes; False if the reader is gone."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:  # another process that shares the descriptor made it non-blocking
            poll = select.poll()
            poll.register(fd, select.POLLOUT)
            poll.poll()
        except OSError:  # the reader is gone, and there is no other place to report it
            return False
    return True


class JsonFormatter(logging.Formatter):
    """One JSON object: time (RFC 3339, UTC, ms), level, logger, message, the FIELDS that are set, exception."""

    def format(self, record: logging.LogRecord) -> str:
        event: dict[str, object] = {
            "time": rfc3339(datetime.fromtimestamp(record.created, UTC)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _message(record),
        }
        event |= _fields(record)
        if exception := _exception(self, record):
            event["exception"] = exception
        try:
            text = _ENCODER.encode(event).decode()
        except UnicodeEncodeError:  # a surrogate, as the name of a file may have one
            text = json.dumps(event, ensure_ascii=False, default=str, separators=(",", ":"))
        # Unsafe characters occur only inside strings, where \u is right.
        return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


class HumanFormatter(logging.Formatter):
    """`18:07:11.042 INFO  agent: message  device=cpu:0 generation=7`, in local time.

    A traceback follows on indented lines of its own, so that no text in it looks like an event.
    """

    def format(self, record: logging.LogRecord) -> str:
        if record.__dict__.get(_SHOWN):
            return "\n".join(printable(line) for line in record.getMessage().split("\n"))
        time = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        head = f"{time}.{int(record.msecs):03d} {record.levelname:<5} {record.name.removeprefix('nodeagent.')}: "
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        lines = [printable(head + _message(record) + (f" {fields}" if fields else ""))]
        lines += [f"    {printable(line)}" for line in _exception(self, record).splitlines()]
        return "\n".join(lines)


def _message(record: logging.LogRecord) -> str:
    text = record.getMessage()
    if len(text) <= MESSAGE_CHARS_MAX:
        return text
    return f"{text[:MESSAGE_CHARS_MAX]}... ({len(text) - MESSAGE_CHARS_MAX} characters more)"


def _fields(record: logging.LogRecord) -> dict[str, object]:
    found = {name: record.__dict__.get(name) for name in FIELDS}
    if found["request_id"] is None:
        found["request_id"] = request_id_var.get()
    return {name: value for name, value in found.items() if value is not None}


def _exception(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    """The traceback and the stack that came with the record; "" for none."""
    parts = [formatter.formatException(record.exc_info)] if record.exc_info and record.exc_info[0] else []
    if record.stack_info:
        parts.append(record.stack_info)
    return "\n".join(parts)[-EXCEPTION_CHARS_MAX:]
