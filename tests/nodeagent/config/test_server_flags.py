import re
import subprocess
from pathlib import Path

import pytest

from nodeagent.config.server_flags import FlagValue, find_flag, flags_argv, sets_flag


@pytest.mark.parametrize(
    ("server_args", "argv"),
    [
        ({"no_mmap": True}, ["--no-mmap"]),
        ({"no-mmap": True}, ["--no-mmap"]),
        ({"--no-mmap": True}, ["--no-mmap"]),
        ({"mlock": False, "offline": None}, []),
        ({"cache_type_k": "q8_0"}, ["--cache-type-k", "q8_0"]),
        ({"ctk": "q8_0"}, ["-ctk", "q8_0"]),
        ({"kvu": True, "nkvo": True}, ["-kvu", "-nkvo"]),
        ({"n": -1, "s": 0}, ["-n", "-1", "-s", "0"]),
        ({"temp": 0.7, "rope_freq_base": 1e6}, ["--temp", "0.7", "--rope-freq-base", "1000000.0"]),
        ({"fit": "off"}, ["--fit", "off"]),
        ({"lora": ("a.gguf", "b.gguf")}, ["--lora", "a.gguf", "--lora", "b.gguf"]),
        ({"lora": ()}, []),
        ({"override_kv": "a_b=int:1"}, ["--override-kv", "a_b=int:1"]),
        ({"control_vector_layer_range": "0 31"}, ["--control-vector-layer-range", "0", "31"]),
        # Of another build than the table's.
        ({"some_new_flag": 1, "y": True, "-xyz": 2}, ["--some-new-flag", "1", "-y", "-xyz", "2"]),
    ],
)
def test_a_map_of_flags_becomes_a_command_line(server_args: dict[str, FlagValue], argv: list[str]) -> None:
    assert flags_argv(server_args) == argv


def test_a_flag_is_known_by_each_of_its_spellings() -> None:
    for name in ("np", "-np", "parallel", "--parallel"):
        assert sets_flag({name: 2}, "parallel")
    assert not sets_flag({"np": None}, "parallel")
    assert not sets_flag({"np": False}, "parallel")
    assert not sets_flag({"no_such_flag": 1}, "parallel")
    assert find_flag("no_such_flag") is None
    # Case counts: -c is the context, -C the CPUs.
    assert find_flag("c") != find_flag("C")


def test_the_table_says_of_every_flag_what_the_servers_help_says(llama_server: Path) -> None:
    help_text = subprocess.run([llama_server, "--help"], capture_output=True, text=True, check=True, timeout=30).stdout
    heads = [line for line in help_text.splitlines() if re.match(r"--?[A-Za-z]", line)]
    assert len(heads) > 200

    for head in heads:
        # "-c,    --ctx-size N      size of the prompt context": spellings, then at one blank what the value is.
        match = re.match(r"((?:-{1,2}[A-Za-z][\w.-]*,\s+)*-{1,2}[A-Za-z][\w.-]*)( \S)?", head)
        assert match is not None, head
        spellings = frozenset(re.split(r",\s+", match[1]))
        flag = find_flag(next(iter(spellings)))
        assert flag is not None, head
        assert spellings <= flag.spellings, head
        assert flag.takes_value == (match[2] is not None), head
