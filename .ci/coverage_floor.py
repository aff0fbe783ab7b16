"""Fail where a file of ours is tested too little: `python .ci/coverage_floor.py COVERAGE_JSON`.

The argument is what `coverage json` wrote, with branches. A file under the floor fails unless EXCUSED says why.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Final

FLOOR_PERCENT: Final = 85.0

# Why a file may be under the floor.
EXCUSED: Final[dict[str, str]] = {
    "nodeagent/front/half_close.py": "a third of it is for systems without epoll",
}


def below_floor(percents: Mapping[str, float], excused: Mapping[str, str]) -> list[str]:
    """One line for each file that fails, and for each excuse of a file that is not there."""
    wrong = [
        f"{file}: {percent:.1f} % is under {FLOOR_PERCENT:g} %: test it, or say in EXCUSED why not"
        for file, percent in sorted(percents.items())
        if percent < FLOOR_PERCENT and file not in excused
    ]
    wrong += [f"{file} is excused, but there is no such file" for file in sorted(set(excused) - set(percents))]
    return wrong


def main(report: Path) -> int:
    files = json.loads(report.read_text(encoding="utf-8"))["files"]
    percents = {file: float(measured["summary"]["percent_covered"]) for file, measured in files.items()}
    wrong = below_floor(percents, EXCUSED) if percents else ["no file was measured"]
    print(
        "\n".join(wrong or [f"{len(percents)} files, each at {FLOOR_PERCENT:g} % or more, or excused: {len(EXCUSED)}"])
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
