"""The control groups that this process is in, as folders, and the numbers in their files.

Formats: cgroups(7), proc_pid_mountinfo(5), and Documentation/admin-guide of the kernel: cgroup-v2.rst, cgroup-v1/. Both
versions may be mounted side by side, each with some of the controllers. Nothing here raises: what is missing, can't be
read or is not understood counts as absent.
"""

import re
from collections.abc import Sequence
from pathlib import Path

_ESCAPED = re.compile(r"\\([0-7]{3})")
# No counter of the kernel has more digits than 2**64.
_NUMBER = re.compile(r"[0-9]{1,20}")


def own_folders(controller: str, files: Sequence[str], root: Path = Path("/")) -> list[Path]:
    """The folders of our cgroup of that controller and of those above it, the innermost first.

    Only folders that have one of these files count: the topmost of version 2, for example, has no limits. `root` is
    where proc and sys are.
    """
    for line in read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        unified = number == "0" and not controllers
        if not unified and controller not in controllers.split(","):
            continue
        mounted = _mounted(root, "cgroup2" if unified else "cgroup", controller)
        if mounted is not None and (folders := _upwards(root, *mounted, path, files)):
            return folders
    return []


def read(path: Path) -> str:
    """The file's text, empty if it can't be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):  # it does not exist, no file descriptor is free, or its name is none
        return ""


def number(text: str) -> int | None:
    """A count or size as the kernel writes it; None for `max`, for nothing and for anything else."""
    text = text.strip()
    return int(text) if _NUMBER.fullmatch(text) else None


def _mounted(root: Path, kind: str, controller: str) -> tuple[str, str] | None:
    """The root and the mount point of that file system."""
    for line in read(root / "proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        fields, more = left.split(), right.split()
        if len(fields) < 5 or len(more) < 3 or more[0] != kind:
            continue
        if kind == "cgroup2" or controller in more[2].split(","):
            return _unescaped(fields[3]), _unescaped(fields[4])
    return None


def _upwards(root: Path, mount_root: str, mount_point: str, path: str, files: Sequence[str]) -> list[Path]:
    """The folders from that cgroup up to the mount.

    A container often sees only its own part of the tree: `mount_root` is then the upper part of `path`.
    """
    top = root / mount_point.lstrip("/")
    inside = path.removeprefix(mount_root) if mount_root != "/" else path
    parts = [part for part in inside.split("/") if part and part != ".."]
    folders = [top.joinpath(*parts[:depth]) for depth in range(len(parts), -1, -1)]
    return [folder for folder in folders if any(_is_file(folder / file) for file in files)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # no permission to search the folder, for example
        return False


def _unescaped(text: str) -> str:
    """A path of mountinfo, where spaces and the like are octal."""
    return _ESCAPED.sub(lambda found: chr(int(found[1], 8)), text)
