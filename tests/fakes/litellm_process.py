"""litellm as a process: a call by a line of JSON on stdin, what comes of it by a line on stdout.

It leaves connections and an event loop open, and takes seconds to import, so it is not imported into pytest. Run with
LITELLM_LOCAL_MODEL_COST_MAP, or its import fetches the prices of models.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_ENV = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}


class LiteLlm:
    """A running process."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def call(self, function: str, **arguments: Any) -> dict[str, Any]:
        """What the function returns: `answer` (of a stream `pieces`), or `error`, its class, and `message`."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"function": function, **arguments}) + "\n")
        self._process.stdin.flush()
        while line := self._process.stdout.readline():
            if line.startswith("{"):  # it prints hints too
                result: dict[str, Any] = json.loads(line)
                return result
        raise AssertionError(f"litellm ended with code {self._process.wait()}")


@contextmanager
def running_litellm() -> Iterator[LiteLlm]:
    """A process, until the block ends; without coverage, since it runs none of the node's code."""
    inherited = {name: value for name, value in os.environ.items() if name != "COVERAGE_PROCESS_CONFIG"}
    with subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=inherited | _ENV,
    ) as process:
        try:
            yield LiteLlm(process)
        finally:
            process.kill()


def _stay_here(event: str, arguments: tuple[Any, ...]) -> None:
    """An audit hook: there is no other host."""
    if event == "socket.connect" and arguments[1][0] != "127.0.0.1":
        raise ConnectionRefusedError(f"a connection to {arguments[1]}")
    if event == "socket.getaddrinfo" and arguments[0] not in ("127.0.0.1", "localhost"):
        raise ConnectionRefusedError(f"a look-up of {arguments[0]}")


def _called(function: str, arguments: dict[str, Any]) -> dict[str, Any]:
    import litellm

    try:
        answer = getattr(litellm, function)(**arguments)
        if arguments.get("stream"):
            return {"pieces": [piece.model_dump(mode="json") for piece in answer]}
        return {"answer": answer.model_dump(mode="json")}
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


if __name__ == "__main__":
    sys.addaudithook(_stay_here)
    for request in sys.stdin:
        asked = json.loads(request)
        print(json.dumps(_called(asked.pop("function"), asked)), flush=True)
