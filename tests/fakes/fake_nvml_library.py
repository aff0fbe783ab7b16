"""Compiles the library that stands in for NVIDIA's (`fake_nvml.c`)."""

import subprocess
from pathlib import Path

_SOURCE = Path(__file__).with_name("fake_nvml.c")


def build(folder: Path) -> Path:
    """Compile it into this folder under the name by which pynvml loads it."""
    library = folder / "libnvidia-ml.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", library, _SOURCE], check=True)
    return library
