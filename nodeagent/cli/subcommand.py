"""What the commands have in common."""

import argparse
from collections.abc import Callable
from pathlib import Path

Command = Callable[[argparse.Namespace], int]


def add_subcommand(
    commands: "argparse._SubParsersAction[argparse.ArgumentParser]",
    name: str,
    does: str,
    run: Command,
    *,
    config: str,
) -> argparse.ArgumentParser:
    """Add a command that `run` carries out; `config` says what its `--config` is for. `action` is its name."""
    parser = commands.add_parser(name, help=does)
    # SUPPRESS: given before the command, the option must survive the command's own default.
    parser.add_argument("--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help=config)
    parser.set_defaults(command=run, action=name)
    return parser
