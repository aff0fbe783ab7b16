"""What a llama-server binary accepts, read from the text of its `--help`. Pure.

The table in `server_flags` describes two builds; other builds have other flags, and only the configured binary's own
help says which. Its lines look like this (builds b10068 and b10434):

    -c,    --ctx-size N      size of the prompt context

The spellings of one flag, separated by commas; one blank and the value's name if it takes one; two blanks or the line's
end before the description.
"""

import difflib
import re
from collections.abc import Callable, Iterator, Mapping

import msgspec

from nodeagent.config.keys import NodeConfig
from nodeagent.config.server_flags import FlagValue, flags_argv
from nodeagent.errors import Problem

_HEAD = re.compile(r"((?:-{1,2}[A-Za-z][\w.-]*,\s+)*-{1,2}[A-Za-z][\w.-]*)( \S)?")
# A help with fewer flags is none: a wrapper script, say, that prints something of its own.
_LEAST_FLAGS = 20


def parse_help(text: str) -> dict[str, bool]:
    """Every spelling of a flag, to whether it takes a value; empty if the text is not the help of a llama-server."""
    flags: dict[str, bool] = {}
    for line in text.splitlines():
        found = _HEAD.match(line)
        if found is not None:
            flags.update(dict.fromkeys(re.split(r",\s+", found[1]), found[2] is not None))
    return flags if len(flags) >= _LEAST_FLAGS else {}


class Dialect(msgspec.Struct, frozen=True):
    """What builds of llama-server spell differently; the defaults are those of the newest."""

    has_spec_type: bool = True
    """A draft model alone drafts nothing: `--spec-type` has to say how."""
    has_fit_target: bool = True
    scales_by_colon: bool = True
    """`--lora-scaled FILE:SCALE`, and not `--lora-scaled FILE SCALE`."""


def parse_dialect(text: str) -> Dialect:
    """The dialect of the binary with this help; the newest if the text is not the help of a llama-server."""
    flags = parse_help(text)
    if not flags:
        return Dialect()
    return Dialect(
        "--spec-type" in flags, "--fit-target" in flags, re.search(r"^--lora-scaled \S+:", text, re.M) is not None
    )


FlagsOf = Callable[[str | None], Mapping[str, bool]]
"""The flags of a binary, as `parse_help` reads them, by its name in the configuration; None is the node's binary."""


def unknown_to_binary(config: NodeConfig, flags_of: FlagsOf) -> list[Problem]:
    """A problem for each flag in `server_args` that the binary of the model, else of a device, else of the node would
    refuse; none where nothing is known of a binary's flags."""
    on_devices = list(dict.fromkeys(device.llama_server_bin for device in config.devices)) or [None]
    return [
        config.problem(("models", index, "server_args", name), message)
        for index, model in enumerate(config.models)
        for binary in ([model.llama_server_bin] if model.llama_server_bin is not None else on_devices)
        if (flags := flags_of(binary))
        for name, value in model.server_args.items()
        for message in _faults(name, value, flags, binary or "the configured llama-server")
    ]


def _faults(name: str, value: FlagValue, flags: Mapping[str, bool], binary: str) -> Iterator[str]:
    argv = flags_argv({name: value})
    if not argv:
        return
    spelling = argv[0]
    if spelling not in flags:
        close = difflib.get_close_matches(spelling, flags, n=1)
        hint = f"; did you mean {close[0].lstrip('-')}?" if close else ""
        yield f"is not a flag of {binary}{hint}"
    elif flags[spelling] and len(argv) == 1:
        yield f"needs a value with {binary}, found true"
    elif not flags[spelling] and len(argv) > 1:
        yield f"takes no value with {binary}, found {value!r}; write true to set the flag"
