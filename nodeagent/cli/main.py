"""The command line: one function per command, and the exit codes.

0   the command did its work, or the daemon stopped because a signal told it to.
1   the daemon could not start (also: no --config) or failed, or the agent refused the command or was not there.
2   argparse could not read the command line: an unknown command or option, or a value that does not fit.
78  the configuration is wrong (EX_CONFIG of BSD's sysexits.h): a restart by the service manager would not help.
130 Ctrl-C ended the command (128 + SIGINT), or a second Ctrl-C the daemon.
143 a second SIGTERM ended the daemon (128 + SIGTERM).
141 the reader of the output went away (128 + SIGPIPE), as `head` does.
"""

import argparse
import gc
import json
import logging
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

from nodeagent import logs
from nodeagent.cli import demo, devices, keys, operations
from nodeagent.cli.subcommand import add_subcommand
from nodeagent.config import (
    NodeConfig,
    check_config,
    find_llama_server,
    json_schema,
    load_config,
    located,
    markdown_reference,
    parse_help,
    unknown_to_binary,
)
from nodeagent.devices.backend import Build
from nodeagent.devices.limits import own_cpus
from nodeagent.devices.selection import devices_of, select
from nodeagent.errors import ConfigError, EndedAtOnce, StartupError
from nodeagent.gguf.header import GgufError, GgufHeader, read_header
from nodeagent.llama_server.binary_help import dialect_of, read_help
from nodeagent.llama_server.catalogue import fits_nowhere
from nodeagent.llama_server.command_line import describe
from nodeagent.llama_server.fit import with_reserve
from nodeagent.llama_server.spans import misplaced

logger = logging.getLogger(__name__)

EXIT_OK = 0
EXIT_FAILED = 1
EXIT_CONFIG = 78
EXIT_INTERRUPTED = 130

PROG = "rolemesh-node-agent"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in `argv` (by default the process's own arguments); return its exit code."""
    try:
        args = _parser().parse_args(argv)
        command: Callable[[argparse.Namespace], int] = args.command
        code = command(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Else the interpreter would fail once more when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return operations.EXIT_PIPE
    except ConfigError as error:
        print(error, file=sys.stderr)
        return EXIT_CONFIG
    except operations.CommandFailed as error:
        print(logs.printable(f"{PROG}: {error}"), file=sys.stderr)  # it may repeat what a server printed
        return EXIT_CONFIG if error.bad_configuration else EXIT_FAILED
    except StartupError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG, description="Keep one llama.cpp server per device alive behind one OpenAI-compatible address."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {version('rolemesh-node-agent')}")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the configuration (YAML); runs the daemon")
    parser.add_argument(
        "--log-format",
        choices=("auto", "human", "json"),
        default="auto",
        help="auto: human on a terminal and for demo, else json",
    )
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="info")
    parser.set_defaults(command=_serve)
    commands = parser.add_subparsers(title="other commands", metavar="COMMAND")

    demonstration = commands.add_parser("demo", help="serve a small real model, fetched on the first run")
    demo.add_arguments(demonstration)
    demonstration.set_defaults(command=_demo)

    does = "list all problems of a configuration, or what it would run"
    add_subcommand(commands, "check-config", does, _check_config, config="the configuration (YAML)")

    schema = commands.add_parser("schema", help="print the JSON Schema of the configuration, or its reference")
    schema.add_argument("--format", choices=("json", "markdown"), default="json", help="default: %(default)s")
    schema.set_defaults(command=_schema)

    devices.add_command(commands)
    keys.add_command(commands)
    operations.add_commands(commands)
    return parser


def _config_path(args: argparse.Namespace) -> Path:
    if args.config is None:
        raise StartupError("no configuration: give --config FILE, or try the command 'demo'")
    path: Path = args.config
    return path


def _serve(args: argparse.Namespace) -> int:
    config = load_config(_config_path(args))
    with closing(logs.configure(args.log_format, args.log_level)):
        return _run_daemon(config)


def _demo(args: argparse.Namespace) -> int:
    # People run the demo: its log is for them, also where they pipe it into a pager or a file.
    log_format: logs.LogFormat = "human" if args.log_format == "auto" else args.log_format
    with closing(logs.configure(log_format, args.log_level)) as sink:

        def serve(path: Path) -> int:
            config = load_config(path)

            def announce(base_url: str) -> None:
                arguments = (config, base_url, sink.show)
                threading.Thread(target=demo.announce, args=arguments, name="demo banner", daemon=True).start()

            return _run_daemon(config, on_ready=announce)

        return demo.demo_main(args, serve)


def _check_config(args: argparse.Namespace) -> int:
    """Print every problem, or the command lines that would be run."""
    config, problems = check_config(_config_path(args))
    if config is None:
        raise ConfigError(problems)
    for warning in config.source.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    try:
        binary = find_llama_server(config)
        problems += unknown_to_binary(config, cache(partial(_flags_of, binary)))
    except ConfigError:  # a missing binary is among the problems already
        binary = Path(config.llama_server_bin or "llama-server")
    with ExitStack() as stack:
        try:
            backend = stack.enter_context(closing(select(config.backend, config.devices, Build(binary))))
            cpus = own_cpus()
            found = with_reserve(devices_of(backend, config.devices, cpus), config)
            problems += misplaced(config, found)
        except ConfigError as error:
            problems += error.problems
        except StartupError as error:
            # The daemon retries, since a driver may come up later; this command reports it.
            problems.append(config.problem(("devices" if config.backend == "auto" else "backend",), str(error)))
        if problems:
            raise ConfigError(located(config, problems))
        for warning in fits_nowhere(config, found):
            print(f"warning: {warning}", file=sys.stderr)
        if cpus.usable < cpus.host:
            print(f"# {cpus}\n")
        print(describe(config, found, backend, binary, dialect_of, _headers(config)))
    return EXIT_OK


def _flags_of(node_binary: Path, own: str | None) -> Mapping[str, bool]:
    """What that binary takes, by its help; a missing one is reported elsewhere."""
    binary = node_binary if own is None else shutil.which(own)
    return parse_help(read_help(Path(binary))) if binary is not None else {}


def _schema(args: argparse.Namespace) -> int:
    if args.format == "markdown":
        print(markdown_reference(), end="")
    else:
        print(json.dumps(json_schema(), indent=2))
    return EXIT_OK


def _run_daemon(config: NodeConfig, *, on_ready: Callable[[str], None] = lambda _base_url: None) -> int:
    # Until the agent catches the signals, Ctrl-C ends the process as SIGTERM does: raised in a callback of the import
    # system or of the event loop, KeyboardInterrupt would be a traceback, or lost.
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Here, not above: the other commands don't need them. Until the agent is ready, all that is made stays.
    gc.disable()
    import trio

    from nodeagent import agent

    try:
        trio.run(partial(agent.run, config, on_ready=on_ready))
    except ConfigError as error:
        raise ConfigError(located(config, error.problems)) from error
    except StartupError:
        raise
    except EndedAtOnce as ended:
        return 128 + ended.signum
    except Exception:
        logger.critical("the agent failed", exc_info=True)
        return EXIT_FAILED
    return EXIT_OK


def _headers(config: NodeConfig) -> dict[str, GgufHeader]:
    """The headers of the models' files; those that can't be read were reported before, or are left out."""
    headers = {}
    for model in config.models:
        with suppress(GgufError):
            headers[model.model_id] = read_header(model.path)
    return headers
