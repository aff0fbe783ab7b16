"""The command line: what was asked, with which exit code it ends.

Exit codes: 0 done, or stopped when told to; 1 could not start or failed; 2 wrong usage; 78 the configuration is bad
(EX_CONFIG of BSD's sysexits.h: a service manager need not try again).
"""

import argparse
import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import version
from pathlib import Path

from nodeagent import logs
from nodeagent.cli import demo, operations
from nodeagent.config import check_config, find_llama_server, json_schema, load_config, located, markdown_reference
from nodeagent.devices.selection import select
from nodeagent.errors import ConfigError, StartupError
from nodeagent.llama_server.command_line import describe

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 78

PROG = "rolemesh-node-agent"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (by default the process's own) asks for; return its exit code."""
    args = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = args.command
    try:
        return command(args)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    except (StartupError, operations.CommandFailed) as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG, description="Keep one llama.cpp server per device alive behind one OpenAI-compatible address."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('rolemesh-node-agent')}")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the configuration (YAML); runs the daemon")
    parser.add_argument(
        "--log-format", choices=("auto", "human", "json"), default="auto", help="auto: human on a terminal"
    )
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.set_defaults(command=_serve)
    commands = parser.add_subparsers(title="other commands", metavar="COMMAND")

    demonstration = commands.add_parser("demo", help="serve a small real model, fetched on the first run")
    demo.add_arguments(demonstration)
    demonstration.set_defaults(command=_demo)

    check = commands.add_parser("check-config", help="say all that is wrong with a configuration, or what it would run")
    # SUPPRESS: given before the command, the option must survive the command's own default.
    check.add_argument(
        "--config", type=Path, metavar="FILE", default=argparse.SUPPRESS, help="the configuration (YAML)"
    )
    check.set_defaults(command=_check_config)

    schema = commands.add_parser("schema", help="print the JSON Schema of the configuration, or its reference")
    schema.add_argument("--format", choices=("json", "markdown"), default="json", help="default: %(default)s")
    schema.set_defaults(command=_schema)

    operations.add_commands(commands)
    return parser


def _config_path(args: argparse.Namespace) -> Path:
    if args.config is None:
        raise StartupError("no configuration: give --config FILE, or try the command 'demo'")
    path: Path = args.config
    return path


def _serve(args: argparse.Namespace) -> int:
    return _run_daemon(args, _config_path(args))


def _demo(args: argparse.Namespace) -> int:
    return demo.demo_main(args, partial(_run_daemon, args))


def _check_config(args: argparse.Namespace) -> int:
    """Print every problem, or the command lines that would be run."""
    config, problems = check_config(_config_path(args))
    if config is None:
        raise ConfigError(problems)
    for warning in config.source.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    with ExitStack() as stack:
        try:
            backend = stack.enter_context(closing(select(config.backend, config.devices)))
            devices = backend.devices(config.devices)
        except ConfigError as error:
            problems += error.problems
        except StartupError as error:
            # The daemon takes it for something that may pass, a driver that is not up yet say; here it is asked about.
            problems.append(config.problem(("devices" if config.backend == "auto" else "backend",), str(error)))
        if problems:
            raise ConfigError(located(config, problems))
        print(describe(config, devices, backend, find_llama_server(config)))
    return EXIT_OK


def _schema(args: argparse.Namespace) -> int:
    if args.format == "markdown":
        print(markdown_reference(), end="")
    else:
        print(json.dumps(json_schema(), indent=2))
    return EXIT_OK


def _run_daemon(args: argparse.Namespace, path: Path, on_ready: Callable[[str], None] = lambda _base_url: None) -> int:
    # Here, not above: hypercorn and quart take 0.3 s to import, which the other commands need not wait for.
    import trio

    from nodeagent import agent

    config = load_config(path)
    sink = logs.configure(args.log_format, args.log_level)
    try:
        trio.run(partial(agent.run, config, on_ready=on_ready))
    except ConfigError as error:
        raise ConfigError(located(config, error.problems)) from error
    except StartupError:
        raise
    except Exception:
        logger.critical("the agent failed", exc_info=True)
        return EXIT_FAILED
    finally:
        sink.close()
    return EXIT_OK
