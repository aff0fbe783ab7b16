"""The options that all measurements of serving share."""

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How much is measured, and with what.

    `seconds` of load for each figure in each of `rounds`. `quick` also uses models that need no download, and fewer
    requests where these are counted: it shows that everything works, and its figures are rough.
    """

    seconds: float
    rounds: int
    quick: bool
    llama_swap: Path | None
    json: Path | None = None
    plot: Path | None = None


def read_options(description: str | None, *, with_files: bool = False) -> Options:
    """Parse the command line; `with_files` also offers `--json` and `--plot`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="of load for each figure in each round (default: 2; quick: 0.15)")
    parser.add_argument("--rounds", type=int, help="in which the peers take turns (default: 3; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="a short run with rough figures")
    parser.add_argument("--llama-swap", type=Path, metavar="BINARY", help="compare with this llama-swap too")
    if with_files:
        parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
        parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures there")
    args = parser.parse_args()
    if with_files and args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: install the `bench` extra")
    return Options(
        seconds=args.seconds or (0.15 if args.quick else 2.0),
        rounds=args.rounds or (1 if args.quick else 3),
        quick=args.quick,
        llama_swap=args.llama_swap,
        json=args.json if with_files else None,
        plot=args.plot if with_files else None,
    )
