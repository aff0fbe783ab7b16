"""The command `rolemesh-node-agent`, which `python -m nodeagent` is too."""

import gc
import signal
import sys
from types import FrameType


def run() -> int:
    """Run the command line; return its exit code.

    Before and after it, Ctrl-C ends the process without the traceback that Python would show of an import, and signals
    without a meaning for the agent are ignored.
    """
    # A shell starts its background jobs with SIGINT ignored, which stays so.
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    for signum in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    # What an import makes stays: to look for garbage in it takes a tenth of the start.
    gc.disable()
    from nodeagent.cli.main import main

    gc.freeze()
    gc.enable()
    if interruptible:
        signal.signal(signal.SIGINT, _interrupt)
    code = main()
    if signal.getsignal(signal.SIGINT) is _interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return code


def _interrupt(_signum: int, _frame: FrameType | None) -> None:
    """Interrupt the command once: a second Ctrl-C ends the process, else it would hit the handling of the first."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(run())
