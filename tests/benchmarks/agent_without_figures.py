"""The agent without what counts and notes requests: with it `costs.py` compares the agent.

Takes the arguments of `python -m nodeagent`.
"""

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from nodeagent.__main__ import run
from nodeagent.front import inference


class NothingNoted:
    """Has the methods of `RequestTally`, and does nothing."""

    bodies = None

    def __init__(self, _tallies: object, _request: object) -> None:
        pass

    def granted(self, _device_id: str, _queued_s: float, _load_s: float) -> None:
        pass

    def answered(self, _status: int) -> None:
        pass

    def passed(self, _chunk: bytes) -> None:
        pass

    def refused(self, refusal: Any) -> None:
        refusal.is_counted = True

    def lost(self) -> None:
        pass

    def completed(self) -> None:
        pass

    def close(self) -> None:
        pass


if __name__ == "__main__":
    vars(inference)["RequestTally"] = NothingNoted
    run()
