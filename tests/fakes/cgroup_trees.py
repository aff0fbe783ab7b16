"""proc and sys below a folder, as a process in control groups sees them."""

from pathlib import Path

# From hosts with each version: the lines of proc_pid_mountinfo(5) for their cgroup file systems.
V2_MOUNT = "29 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
HYBRID_MOUNT = "42 28 0:39 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n"
V1_UNLIMITED_BYTES = 9223372036854771712


def v1_mount(controllers: str, root: str = "/") -> str:
    """The mount of these controllers, from that part of the tree on."""
    return f"34 28 0:31 {root} /sys/fs/cgroup/{controllers} rw,nosuid shared:9 - cgroup cgroup rw,{controllers}\n"


def lay(root: Path, name: str, text: str) -> None:
    """Write that file below `root`, with its folders."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
