"""The table of errors as Markdown, made from the one that answers them.

`python -m nodeagent.front.error_table` writes it into the room's README.
"""

import inspect
import json
from pathlib import Path

from nodeagent.errors import Refusal
from nodeagent.front.refusals import REFUSALS, Row, error_response

README = Path(__file__).parent / "README.md"
_BEGIN = "<!-- errors: begin -->\n"
_END = "<!-- errors: end -->\n"

# Errors without a Refusal: when they happen, and what the client should do.
_OTHERS = {
    400: ("the request is malformed HTTP", "correct the request"),
    404: ("the path does not exist; the message says where the paths are", "correct the path"),
    405: ("the path exists, but not for this method; `Allow` lists its methods", "use one of them"),
    431: ("more than 100 headers, or more than 32 KiB of them", "send fewer headers"),
    500: ("a bug in the node; its log has a traceback under the request's id", "report it"),
    501: ("a `Transfer-Encoding` other than `chunked`", "use `chunked`"),
    505: ("a version of HTTP other than 1.0 and 1.1", "use HTTP/1.1"),
}


def markdown_table() -> str:
    """Every error with its status, in the order of the statuses."""
    rows = [(row.status, _line(row, _retry_after(kind, row))) for kind, row in REFUSALS.items()]
    rows += [(status, _line(_other(status, *texts), "-")) for status, texts in _OTHERS.items()]
    lines = [line for _status, line in sorted(rows, key=lambda it: it[0])]
    head = ("| status | code | type | when | `Retry-After` | what to do |", "|---|---|---|---|---|---|")
    return "\n".join([*head, *lines]) + "\n"


def with_table(readme: str) -> str:
    """The README with the present table between its two marks."""
    before, _, rest = readme.partition(_BEGIN)
    _old, _, after = rest.partition(_END)
    return f"{before}{_BEGIN}{markdown_table()}{_END}{after}"


def _line(row: Row, retry_after: str) -> str:
    code = f"`{row.code}`" if row.code else "-"
    return f"| {row.status} | {code} | `{row.type}` | {row.when} | {retry_after} | {row.client} |"


def _retry_after(kind: type[Refusal], row: Row) -> str:
    carried = "retry_after_s" in inspect.signature(kind.__init__).parameters
    fixed = None if row.retry_after_s is None else f"{row.retry_after_s:g} s"
    if carried:
        return f"computed, else {fixed}" if fixed else "computed"
    return fixed or ("never: `x-should-retry: false`" if row.final else "-")


def _other(status: int, when: str, client: str) -> Row:
    error = json.loads(error_response(status, "", "")[2])["error"]
    return Row(status=status, type=error["type"], code=error["code"], message=lambda _it: "", when=when, client=client)


if __name__ == "__main__":
    README.write_text(with_table(README.read_text(encoding="utf-8")), encoding="utf-8")
