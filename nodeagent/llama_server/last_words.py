"""Of all that a server printed before it exited, the few lines that tell people why. Pure.

For a wrong value of a flag, builds b10068 and b10434 print the error, a blank line, `usage:`, the help of that flag,
and how to see the rest of the help. The error names the flag, but often not the value ("stoi").
"""

import itertools
import re
import shlex
from collections.abc import Iterator, Sequence
from typing import Final

LINES_READ: Final = 100
"""How many of the last lines are looked through; the help of one flag has up to 30."""
_LINES_TOLD: Final = 5

_SAYS_ERROR = re.compile(
    r"\b(?:error|fail(?:ed|ure|s)?|invalid|unknown|unsupported|unable|can ?not|can't|couldn't|could not|fatal|exception"
    r"|assert|abort(?:ed|ing)?"
    r"|out of memory|ErrorOutOf\w*|no such|terminate called|what\(\))(?!\w)|GGML_ASSERT|^[\d.]+ E ",
    re.IGNORECASE,
)
_USAGE_BEGINS = re.compile(r"\s*usage:", re.IGNORECASE)
# Within a usage text: blank lines, flags, and what is indented.
_USAGE_GOES_ON = re.compile(r"\s*$|\s|-")
_POINTS_TO_HELP = re.compile(r"\s*to show complete usage\b", re.IGNORECASE)
_WRONG_VALUE = re.compile(r'error while handling argument "([^"]+)"')


def last_words(lines: Sequence[str], argv: Sequence[str] = ()) -> list[str]:
    """At most five lines: those that say error, and after them what else came last.

    Blank lines and usage texts are left out. If a line names a flag of `argv` without its value, the value is added.
    """
    telling = list(dict.fromkeys(line.strip() for line in _without_usage(lines)))
    errors = [line for line in telling if _SAYS_ERROR.search(line)][-_LINES_TOLD:]
    others = [line for line in telling if line not in errors]
    room = _LINES_TOLD - len(errors)
    return [_with_value(line, argv) for line in errors] + (others[-room:] if room else [])


def last_error(lines: Sequence[str]) -> str | None:
    """The last line that says error; without one, the last that is not of a usage text. None if there is none."""
    told = [line.strip() for line in _without_usage(lines)]
    errors = [line for line in told if _SAYS_ERROR.search(line)]
    return next(reversed(errors or told), None)


def _without_usage(lines: Sequence[str]) -> Iterator[str]:
    in_usage = False
    for line in lines:
        in_usage = bool(_USAGE_BEGINS.match(line) or (in_usage and _USAGE_GOES_ON.match(line)))
        if not in_usage and line.strip() and not _POINTS_TO_HELP.match(line):
            yield line


def _with_value(line: str, argv: Sequence[str]) -> str:
    named = _WRONG_VALUE.search(line)
    if named is None:
        return line
    flag, rest = named[1], line[named.end() :]
    values = [value for given, value in itertools.pairwise(argv) if given == flag]
    missing = [value for value in values if not value or not re.search(rf"(?<!\w){re.escape(value)}(?!\w)", rest)]
    return f"{line} (given: {shlex.join([flag, *missing])})" if missing else line
