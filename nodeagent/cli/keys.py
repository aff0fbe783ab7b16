"""`keys add`, `keys list` and `keys remove`: the API keys that are kept in the state folder.

A running agent sees a change within a second; none has to run.
"""

import argparse
import json
import secrets
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from nodeagent.access.limits import Sums
from nodeagent.access.sums import account_json, read_sums, sums_file
from nodeagent.cli.discovery import find_state_dir
from nodeagent.cli.operations import columns
from nodeagent.cli.subcommand import Command, add_subcommand
from nodeagent.config import ApiKeyConfig, NodeConfig, load_config, read_key_file
from nodeagent.config.api_keys import PRIORITIES, ROLES, digest_of
from nodeagent.config.key_file import changing, write_key_file
from nodeagent.errors import ConfigError, StartupError

_PREFIX = "rmk-"
_RANDOM_BYTES = 32


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `keys` and its own commands."""
    keys = commands.add_parser("keys", help="make, list and remove API keys")
    actions = keys.add_subparsers(title="actions", metavar="ACTION", required=True)

    add = _action(actions, "add", "make a key, and print it: it is not shown again", _add)
    add.add_argument("name", help="who uses it, for logs and sums")
    add.add_argument("--role", action="append", choices=ROLES, help="may be repeated (default: inference)")
    add.add_argument(
        "--model", action="append", metavar="MODEL_ID", help="only for this model; may be repeated (default: all)"
    )
    add.add_argument("--priority", choices=PRIORITIES, help="highest priority of its requests")
    for limit in ("requests-per-minute", "concurrent-requests", "tokens-per-day"):
        add.add_argument(f"--{limit}", type=int, metavar="N", help="default: no limit")

    show = _action(actions, "list", "list the keys, what they may do, and what they have used", _list)
    show.add_argument("--json", action="store_true", help="for programs")

    remove = _action(actions, "remove", "remove a key: it is not valid any more", _remove)
    remove.add_argument("name")


def _action(
    actions: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, does: str, run: Command
) -> argparse.ArgumentParser:
    return add_subcommand(actions, name, does, run, config="the configuration of the agent (YAML)")


def _add(args: argparse.Namespace) -> int:
    key = _PREFIX + secrets.token_urlsafe(_RANDOM_BYTES)
    fields = {
        "name": args.name,
        "sha256": digest_of(key),
        "roles": args.role,
        "models": args.model,
        "priority": args.priority,
        "requests_per_minute": args.requests_per_minute,
        "concurrent_requests": args.concurrent_requests,
        "tokens_per_day": args.tokens_per_day,
    }
    try:
        entry = ApiKeyConfig.model_validate({name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise StartupError(f"{first['loc'][0]}: {first['msg']}, found {first['input']!r}") from None
    state_dir, config = _place(args)
    if config is not None:
        _check_models(entry, config)
    with changing(state_dir):
        made = read_key_file(state_dir)
        if entry.name in [other.name for other in (*made, *(config.api_keys if config else ()))]:
            raise StartupError(f"there is a key named {entry.name!r} already; remove it first, or use another name")
        write_key_file(state_dir, [*made, entry])
    print(f"The key of {entry.name}; it is not shown again:", file=sys.stderr)
    print(key)
    return 0


def _check_models(entry: ApiKeyConfig, config: NodeConfig) -> None:
    known = [model.model_id for model in config.models]
    for model_id in entry.models or ():
        if model_id not in known:
            raise StartupError(f"--model must be the model_id of a model ({', '.join(known)}), found {model_id!r}")


def _remove(args: argparse.Namespace) -> int:
    state_dir, config = _place(args)
    with changing(state_dir):
        made = read_key_file(state_dir)
        left = [entry for entry in made if entry.name != args.name]
        if len(left) == len(made):
            if config is not None and args.name in [entry.name for entry in config.api_keys]:
                raise StartupError(f"{args.name!r} is in the configuration (api_keys): remove it there, and reload")
            names = ", ".join(entry.name for entry in made) or "none"
            raise StartupError(f"there is no key named {args.name!r}, only: {names}")
        write_key_file(state_dir, left)
    print(f"Removed the key of {args.name}.")
    return 0


def _list(args: argparse.Namespace) -> int:
    state_dir, config = _place(args)
    entries = [*(config.api_keys if config else ()), *read_key_file(state_dir)]
    sums = read_sums(sums_file(state_dir))
    rows = [account_json(entry, sums.get(entry.name) or Sums()) for entry in entries]
    if args.json:
        print(json.dumps({"keys": rows}, indent=2))
        return 0
    if not rows:
        print("There is no key. Make one by: keys add NAME")
        return 0
    table = [("NAME", "ROLES", "MODELS", "PRIORITY", "LIMITS", "REQUESTS", "TOKENS"), *map(_cells, rows)]
    print(columns(table))
    return 0


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    limits = [
        f"{row[name]} {words}"
        for name, words in (
            ("requests_per_minute", "requests/min"),
            ("concurrent_requests", "at once"),
            ("tokens_per_day", "tokens/day"),
        )
        if row[name] is not None
    ]
    used = row["used"]
    return (
        row["name"],
        ",".join(row["roles"]),
        ",".join(row["models"]) if row["models"] else "all",
        row["priority"],
        ", ".join(limits) or "none",
        str(used["requests"]),
        str(used["prompt_tokens"] + used["generated_tokens"]),
    )


def _place(args: argparse.Namespace) -> tuple[Path, NodeConfig | None]:
    """The state folder, and the configuration if one is named and has no errors."""
    if args.config is None:
        return find_state_dir(None), None
    try:
        config = load_config(args.config)
    except ConfigError:
        return find_state_dir(args.config), None
    return config.state_dir, config
