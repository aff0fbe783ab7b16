#!/usr/bin/env python3
"""Keep any command alive that listens on a TCP port, with the supervisor alone.

python examples/supervise.py 8000 -- python3 -m http.server 8000
"""

import argparse
import logging
import os

import trio

from supervisor.probe import NotReady, ProcessView
from supervisor.spec import ChildSpec
from supervisor.supervisor import GivenUp, StartFailed, Supervisor


class TcpProbe:
    """The child is ready, and well, if that port accepts connections."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def check(self, process: ProcessView) -> str:
        try:
            await (await trio.open_tcp_stream("127.0.0.1", self.port)).aclose()
        except OSError as error:
            raise NotReady(f"port {self.port} refuses connections") from error
        return f"127.0.0.1:{self.port}"


async def main(port: int, command: list[str]) -> None:
    supervisor = Supervisor(on_line=lambda _child, _generation, line: print("|", line))
    async with trio.open_nursery() as nursery:
        await nursery.start(supervisor.run, name="supervisor")
        child = ChildSpec(
            child_id="command",
            group="commands",
            argv=tuple(command),
            env=dict(os.environ),
            probe=TcpProbe(port),
            start_timeout_s=10,
        )
        try:
            await supervisor.start(child)
        except (StartFailed, GivenUp) as failure:
            print(f"not started: {failure}")
        await trio.sleep_forever()  # until Ctrl-C; the supervisor restarts the command whenever it exits


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("port", type=int)
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        # Ctrl-C interrupts only at a checkpoint: elsewhere it could hit between a spawn and its supervision.
        trio.run(main, arguments.port, arguments.command, restrict_keyboard_interrupt_to_checkpoints=True)
    except* KeyboardInterrupt:
        print("stopped")
