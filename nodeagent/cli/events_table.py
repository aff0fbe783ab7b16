"""One event of the node as a line for people."""

from datetime import datetime
from typing import Any

from nodeagent.logs import printable


def event_line(event: dict[str, Any]) -> str:
    """`18:07:11 cpu:0 planner ready (generation 7)`, in local time, with the reason if there is one."""
    try:
        at = datetime.fromisoformat(event["at"]).astimezone().strftime("%H:%M:%S")
    except (KeyError, TypeError, ValueError):
        at = "--:--:--"
    place = [event[key] for key in ("device_id", "model_id") if event.get(key)]
    generation = f" (generation {event['generation']})" if event.get("generation") is not None else ""
    reason = f": {event['reason']}" if event.get("reason") else ""
    return printable(" ".join([at, *place, f"{event.get('kind', '?')}{generation}{reason}"]))
