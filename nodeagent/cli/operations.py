"""The operators' commands: each sends one request to the running agent.

The agent's state folder (see `discovery`) has its address and its admin token.
"""

import argparse
import json
import os
import re
import select
import ssl
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nodeagent.cli.discovery import find_state_dir
from nodeagent.cli.events_table import ACTIVITY_HEAD, activity_line, activity_text, event_line
from nodeagent.cli.subcommand import Command, add_subcommand
from nodeagent.errors import NodeAgentError, StartupError
from nodeagent.logs import printable
from nodeagent.state_dir import admin_token, certificate_file, read_address

if TYPE_CHECKING:
    import httpx

# The reader of the output went away (128 + SIGPIPE).
EXIT_PIPE = 141
# A load may wait for requests in flight, and then for the model.
_LOAD_TIMEOUT_S = 3600.0
_TIMEOUT_S = 30.0


class CommandFailed(NodeAgentError):
    """The agent refused; the message is its own. `bad_configuration` says that its configuration file has errors."""

    def __init__(self, message: str, *, bad_configuration: bool = False) -> None:
        self.bad_configuration = bad_configuration
        super().__init__(message)


def add_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the operators' commands; `--config` says which agent they speak to."""
    show = _command(commands, "status", "show devices, servers and models", status)
    show.add_argument("--json", action="store_true", help="the whole inventory, for programs")
    load = _model_command(commands, "load", "load a model, and wait until it is ready", load_model)
    load.add_argument("--device", metavar="ID", help="on this device (default: where a request would go)")
    load.add_argument("--no-wait", action="store_true", help="start the load and return")
    for name, does in (("unload", "stop a model's servers"), ("restart", "stop a model's servers and load it again")):
        one = _model_command(commands, name, f"{does}, after the requests in flight", change_model)
        one.add_argument("--force", action="store_true", help="end the requests in flight")
    for name, does in (
        ("drain", "leave the load balancers' rotation, then accept no new requests (after drain_grace_s)"),
        ("undrain", "accept requests again"),
    ):
        _command(commands, name, does, change_service)
    _command(commands, "reload", "apply the configuration file as it is now", change_node)
    follow = _command(commands, "events", "print every transition as it happens", events)
    follow.add_argument("--json", action="store_true", help="one JSON object per line, for programs")
    follow.add_argument(
        "--follow",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="--no-follow prints the events so far and ends",
    )
    follow.add_argument(
        "--after",
        type=int,
        default=0,
        metavar="ID",
        help="only events after this one (default: all that the agent keeps)",
    )
    requests = _command(commands, "activity", "print what the last requests took", activity)
    requests.add_argument("--id", type=int, metavar="ID", help="this one, with the bodies that are kept of it")
    requests.add_argument("--limit", type=int, default=20, metavar="N", help="the last N (default: %(default)s)")
    requests.add_argument("--model", metavar="MODEL_ID", help="of this model only")
    requests.add_argument("--json", action="store_true", help="one JSON object per line, for programs")
    requests.add_argument("--follow", "-f", action="store_true", help="then print new ones as they end")
    lines = _command(commands, "logs", "print the output of a device's servers", logs)
    lines.add_argument("device", metavar="DEVICE", help="for example cpu:0")
    lines.add_argument("--lines", type=int, default=100, metavar="N", help="the last N lines (default: %(default)s)")
    lines.add_argument(
        "--follow",
        "-f",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="then print new lines as they come (default: %(default)s)",
    )


def _command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, does: str, run: Command
) -> argparse.ArgumentParser:
    return add_subcommand(commands, name, does, run, config="the running agent's configuration")


def _model_command(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, does: str, run: Command
) -> argparse.ArgumentParser:
    parser = _command(commands, name, does, run)
    parser.add_argument("model", metavar="MODEL", help="its id or alias")
    return parser


def status(args: argparse.Namespace) -> int:
    with _agent(args) as http:
        inventory = _answer(http.get("/v1/node/inventory"))
    print(json.dumps(inventory, indent=2) if args.json else table(inventory))
    return 0


def load_model(args: argparse.Namespace) -> int:
    fields = {"device_id": args.device, "wait": not args.no_wait}
    with _agent(args) as http:
        answer = http.post(f"/v1/node/models/{args.model}/load", json=fields, timeout=_LOAD_TIMEOUT_S)
        print(json.dumps(_answer(answer)))
    return 0


def change_model(args: argparse.Namespace) -> int:
    with _agent(args) as http:
        path = f"/v1/node/models/{args.model}/{args.action}"
        print(json.dumps(_answer(http.post(path, json={"force": args.force}, timeout=_LOAD_TIMEOUT_S))))
    return 0


def change_node(args: argparse.Namespace) -> int:
    with _agent(args) as http:
        print(json.dumps(_answer(http.post(f"/v1/node/{args.action}"))))
    return 0


def change_service(args: argparse.Namespace) -> int:
    """Drain or undrain, and say in words what the node does now."""
    with _agent(args) as http:
        state = _answer(http.post(f"/v1/node/{args.action}"))
    reasons = f" ({'; '.join(state['reasons'])})" if state["reasons"] else ""
    print(printable(f"the node is {state['status']}{reasons}"))
    return 0


def _end_with_reader() -> None:
    """End this process when the reader of its output goes away, as `head` does: a command that follows may have
    nothing to write for hours, and would notice only then."""
    try:
        output = sys.stdout.fileno()
    except OSError:  # stdout is no file, as in a test
        return
    if not stat.S_ISFIFO(os.fstat(output).st_mode):
        return

    def wait() -> None:
        poll = select.poll()
        poll.register(output, 0)  # POLLERR and POLLHUP are always reported
        poll.poll()
        os._exit(EXIT_PIPE)

    threading.Thread(target=wait, name="reader of the output", daemon=True).start()


def events(args: argparse.Namespace) -> int:
    _end_with_reader()
    params = {"after": args.after, "follow": str(args.follow).lower()}
    with _agent(args) as http, http.stream("GET", "/v1/node/events", params=params, timeout=None) as it:
        _refused(it)
        for line in it.iter_lines():
            if line.startswith("data: "):
                data = line.removeprefix("data: ")
                print(data if args.json else event_line(json.loads(data)), flush=True)
    return 0


def activity(args: argparse.Namespace) -> int:
    if args.id is not None:
        return _one_of_activity(args)
    _end_with_reader()
    params = {"limit": str(args.limit), **({"model_id": args.model} if args.model else {})}
    show = json.dumps if args.json else activity_line
    with _agent(args) as http:
        records = _answer(http.get("/v1/node/activity", params=params))["activity"]
        if not args.json:
            print(ACTIVITY_HEAD)
        for record in reversed(records):
            print(show(record), flush=True)
        if not args.follow:
            return 0
        params |= {"follow": "true", "since": str(records[0]["id"] if records else 0)}
        with http.stream("GET", "/v1/node/activity", params=params, timeout=None) as it:
            _refused(it)
            for line in it.iter_lines():
                if line.startswith("data: "):
                    print(show(json.loads(line.removeprefix("data: "))), flush=True)
    return 0


def _one_of_activity(args: argparse.Namespace) -> int:
    with _agent(args) as http:
        record = _answer(http.get(f"/v1/node/activity/{args.id}"))
    print(json.dumps(record) if args.json else activity_text(record))
    return 0


def logs(args: argparse.Namespace) -> int:
    _end_with_reader()
    params = {"lines": args.lines, "follow": "true" if args.follow else "false"}
    path = f"/v1/node/devices/{args.device}/logs"
    with _agent(args) as http, http.stream("GET", path, params=params, timeout=None) as it:
        _refused(it)
        for line in it.iter_lines():
            print(printable(line), flush=True)
    return 0


def table(inventory: dict[str, Any]) -> str:
    """The inventory as a table for people."""
    reasons = "".join(f"\n  {printable(reason)}" for reason in inventory["reasons"])
    rows = [("DEVICE", "MODEL", "STATE", "GEN", "CONTEXT", "IN FLIGHT", "WAITING", "MEMORY FREE", "REASON")]
    for device in inventory["devices"]:
        lane, free = device["lane"], device["metrics"]["memory_free_bytes"]
        load = (f"{lane['in_flight']}", f"{lane['waiting']}/{lane['limit']}", gib(free))
        used_by = device.get("used_by", [])
        for model_id in used_by:
            rows.append((device["device_id"], model_id, "spans it", "-", "-", *load, ""))
        for server in device["servers"] or ([] if used_by else [None]):
            facts = _server_facts(server)
            rows.append((device["device_id"], *facts[:4], *load, facts[4]))
    models = [("MODEL", "LOADED ON", "SIZE", "LOADS IN", "ROLES")]
    for model in inventory["models"]:
        load_s = model["load_time_s"]
        models.append(
            (
                model["model_id"],
                ", ".join(model["loaded_on"]) or "-",
                gib(model["size_bytes"]),
                f"{load_s:.1f} s" if load_s is not None else "-",
                ", ".join(model["roles"]) or "-",
            )
        )
    fits = [("MODEL", "DEVICE", "STATE", "MEMORY", "WHY")]
    for model in inventory["models"]:
        for fit in model.get("fits", ()):  # an older agent says nothing of it
            state = fit["state"].replace("_", " ")
            fits.append((model["model_id"], fit["device_id"], state, _needed(fit), fit["why"]))
    head = printable(f"{inventory['node_id']} at {inventory['base_url']}: {inventory['status']}") + reasons
    return "\n\n".join((head, columns(rows), columns(models), columns(fits)))


def _needed(fit: dict[str, Any]) -> str:
    """What a server of the model takes of the device's memory; `~` is an estimate."""
    needed = fit["memory_needed_bytes"]
    return gib(needed) if needed is None or fit["measured"] else f"~{gib(needed)}"


def _server_facts(server: dict[str, Any] | None) -> tuple[str, str, str, str, str]:
    if server is None:
        return "-", "empty", "-", "-", ""
    ready_in = f"ready in {server['ready_in_s']:.0f} s: " if server["ready_in_s"] else ""
    context = str(server.get("slot_ctx_size") or "-")
    spans = f"spans {', '.join(server['device_ids'])}" if server.get("device_ids") else ""
    reason = "; ".join(part for part in (spans, ready_in + (server["reason"] or "")) if part)
    return server["model_id"], server["state"], str(server["generation"]), context, reason


def gib(size: int | None) -> str:
    """A size for people; `-` is unknown."""
    return "-" if size is None else f"{size / 2**30:.1f} GiB"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """The rows as lines, each column as wide as its widest cell."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(printable(line.rstrip()) for line in lines)


@contextmanager
def _agent(args: argparse.Namespace) -> "Iterator[httpx.Client]":
    """A client of the agent that runs with this configuration; without one, of the node with the default settings."""
    import httpx  # here, as the daemon, which needs none of this, imports this module too

    state_dir = find_state_dir(args.config)
    base_url = read_address(state_dir)
    headers = {"Authorization": f"Bearer {admin_token(state_dir)}"}
    try:
        verify = _trusts(certificate_file(state_dir)) if base_url.startswith("https:") else True
        with httpx.Client(
            base_url=base_url, headers=headers, timeout=_TIMEOUT_S, trust_env=False, verify=verify
        ) as http:
            yield http
    except httpx.HTTPError as error:
        raise StartupError(
            f"no agent answers at {base_url} ({_in_words(error)}): is it running? "
            f"Its address was read from {state_dir / 'address'}"
        ) from error


def _trusts(certificate: Path) -> ssl.SSLContext:
    """TLS with whoever has this certificate's key, whatever its names: the agent is asked at its local address."""
    try:
        context = ssl.create_default_context(cafile=certificate)
    except OSError as error:
        raise StartupError(f"the certificate of this agent can't be read: {certificate}: {error}") from error
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def _in_words(error: "httpx.HTTPError") -> str:
    """Why a request failed, without the names of our libraries' classes."""
    import httpx

    match error:
        case httpx.ConnectTimeout():
            return "the connection timed out"
        case httpx.ConnectError():
            return re.sub(r"^\[Errno \d+\] ", "", str(error)).lower()
        case httpx.TimeoutException():
            return "no response in time"
        case _:
            return f"the connection was lost: {error}" if str(error) else "the connection was lost"


def _refused(answer: "httpx.Response") -> None:
    if answer.is_error:
        answer.read()
        _answer(answer)


def _answer(answer: "httpx.Response") -> Any:
    """The response's JSON; CommandFailed with the agent's own message if it is an error."""
    try:
        said = answer.json()
    except ValueError:
        raise CommandFailed(f"the agent answered {answer.status_code} without JSON") from None
    if answer.is_error:
        message = _message(said) or f"the agent answered {answer.status_code} without a message"
        raise CommandFailed(message, bad_configuration=answer.status_code == 422)
    return said


def _message(said: Any) -> str | None:
    """The message of an error of the agent; None if the JSON is another server's."""
    match said:
        case {"error": {"message": str(message)}}:
            return message
    return None
