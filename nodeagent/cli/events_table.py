"""One event of the node, or one request, as a line for people."""

from datetime import datetime
from typing import Any

from nodeagent.logs import printable

_COLUMNS = "{:>6}  {:8}  {:>6}  {:16}  {:8}  {:24}  {:>8}  {:>8}  {:>8}  {:>8}  {:>7}  {:>7}  {:>8}  {}"
ACTIVITY_HEAD = _COLUMNS.format(
    *("ID", "TIME", "STATUS", "KEY", "DEVICE", "MODEL"),
    *("QUEUE", "LOAD", "FIRST", "TOTAL", "PROMPT", "TOKENS", "TOKENS/S", "ERROR"),
)


def activity_line(record: dict[str, Any]) -> str:
    """One request under `ACTIVITY_HEAD`: when it came, what it took, and why it failed; `-` is unknown."""
    texts = [_text(record.get("id")), _clock(record.get("time"))]
    texts += [_text(record.get(key)) for key in ("status", "key_name", "device_id", "model_id")]
    texts += [_seconds(record.get(key)) for key in ("queue_ms", "load_ms", "first_token_ms", "duration_ms")]
    texts += [_text(record.get(key)) for key in ("prompt_tokens", "completion_tokens", "tokens_per_s")]
    return printable(_COLUMNS.format(*texts, record.get("error") or "").rstrip())


def activity_text(record: dict[str, Any]) -> str:
    """One request with its bodies."""
    parts = [f"{ACTIVITY_HEAD}\n{activity_line(record)}"]
    bodies = {"Request": record.get("request_body"), "Answer": record.get("answer_body")}
    parts += [_body(name, body) for name, body in bodies.items() if body is not None]
    if len(parts) == 1:
        parts.append("Its bodies are not kept: `activity.bodies` keeps those of the last requests.")
    return "\n\n".join(parts)


def _body(name: str, body: dict[str, Any]) -> str:
    text, cut = body["text"], ", cut" if body["cut"] else ""
    head = printable(f"{name} ({body['type'] or 'of no type'}, {body['bytes']} bytes{cut}):")
    if text is None:
        return f"{head} no text"
    return "\n".join([head, *map(printable, text.removesuffix("\n").split("\n"))])


def _text(value: object) -> str:
    return "-" if value is None else str(value)


def _seconds(milliseconds: object) -> str:
    return f"{milliseconds / 1000:.2f} s" if isinstance(milliseconds, int | float) else "-"


def _clock(time: object) -> str:
    """The time of day here."""
    try:
        return datetime.fromisoformat(str(time)).astimezone().strftime("%H:%M:%S")
    except ValueError:
        return "--:--:--"


def event_line(event: dict[str, Any]) -> str:
    """`18:07:11 cpu:0 planner ready (generation 7)`, in local time, with the reason if there is one."""
    at = _clock(event.get("at"))
    place = [event[key] for key in ("device_id", "model_id") if event.get(key)]
    generation = f" (generation {event['generation']})" if event.get("generation") is not None else ""
    reason = f": {event['reason']}" if event.get("reason") else ""
    return printable(" ".join([at, *place, f"{event.get('kind', '?')}{generation}{reason}"]))
