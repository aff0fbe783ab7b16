"""Binaries are asked for their help without holding up the event loop, and whatever they do instead of answering."""

import os
import signal
import time
from pathlib import Path

import pytest
import trio

from nodeagent.config import Dialect
from nodeagent.llama_server.binary_help import Dialects, read_help

OLD = "".join(f"--flag-{number}  a flag\n" for number in range(30))
NEW = OLD + "--spec-type T  a type\n--fit-target N  MiB\n--lora-scaled FNAME:SCALE,...  adapters\n"
OLD_DIALECT = Dialect(has_spec_type=False, has_fit_target=False, scales_by_colon=False)


def program(folder: Path, script: str, name: str = "llama-server") -> str:
    file = folder / name
    fresh = folder / "fresh"
    fresh.write_text(f"#!/bin/sh\n{script}\n")
    fresh.chmod(0o755)
    fresh.replace(file)
    return str(file)


def prints(text: str) -> str:
    return f"cat <<EOF\n{text}EOF"


async def test_a_binary_is_asked_once_and_again_when_it_has_changed(tmp_path: Path) -> None:
    with trio.fail_after(10):
        binary = program(tmp_path, f"echo asked >>{tmp_path}/calls\n{prints(OLD)}")
        dialects = Dialects()
        await dialects.look()
        assert dialects.of(binary) == Dialect(), "nothing is known yet"
        assert not (tmp_path / "calls").exists()
        for _ in range(3):
            await dialects.look()
        assert dialects.of(binary) == OLD_DIALECT
        assert (tmp_path / "calls").read_text() == "asked\n"
        program(tmp_path, prints(NEW))
        os.utime(binary, ns=(1, 1))
        assert dialects.of(binary) == OLD_DIALECT, "as it was when it was asked last"
        await dialects.look()
        assert dialects.of(binary) == Dialect()


async def test_the_event_loop_goes_on_while_a_binary_hangs_and_others_are_known(tmp_path: Path) -> None:
    with trio.fail_after(10):
        hangs = program(tmp_path, f"echo $$ >{tmp_path}/pid; exec sleep 60", "hangs")
        old = program(tmp_path, prints(OLD), "old")
        dialects = Dialects(patience_s=0.5)
        assert (dialects.of(hangs), dialects.of(old)) == (Dialect(), Dialect())
        gaps = [0.0]

        async def tick() -> None:
            before = time.monotonic()
            while True:
                await trio.sleep(0.01)
                gaps.append(time.monotonic() - before)
                before = time.monotonic()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(tick)
            await dialects.look()
            nursery.cancel_scope.cancel()
        assert max(gaps) < 0.4
        assert (dialects.of(hangs), dialects.of(old)) == (Dialect(), OLD_DIALECT)
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)  # lets the thread end


@pytest.mark.parametrize("script", ["sleep 60 & sleep 60", "trap '' TERM; while :; do sleep 1; done"])
def test_a_binary_that_does_not_end_is_ended_with_its_children(script: str, tmp_path: Path) -> None:
    began = time.monotonic()
    assert read_help(Path(program(tmp_path, script)), timeout_s=0.2) == ""
    assert time.monotonic() - began < 5


def test_a_binary_that_prints_without_end_costs_a_mebibyte(tmp_path: Path) -> None:
    assert len(read_help(Path(program(tmp_path, "yes")))) == 2**20
