"""Where a process listens, as the operating system says: nothing that a process prints can forge that.

On Linux the sockets among /proc/<pid>/fd are looked up by their inodes in /proc/net/tcp and tcp6 (proc_pid_net(5)).
These are the tables of our own network namespace: the socket of a process in another one is not in them, and could not
be reached from here. Elsewhere psutil tells.
"""

import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address

import psutil
import trio

from supervisor.strays import stat_of

# Of a listening socket: local address and port, remote address, state 0A (TCP_LISTEN), queues, timer, retransmits,
# user, timeout, inode. Addresses are words of 32 bits in the byte order of the host.
_LISTENS = re.compile(
    rb"^ *\d+: ([0-9A-F]{8}|[0-9A-F]{32}):([0-9A-F]{4}) [0-9A-F]+:[0-9A-F]+ 0A \S+ \S+ \S+ +\d+ +\d+ (\d+)\b",
    re.MULTILINE,
)
_TABLES = ("/proc/net/tcp", "/proc/net/tcp6")
_READ_BYTES = 64 * 1024
# After so many descriptors other tasks get to run.
_LINKS_AT_A_TIME = 500


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP socket that accepts connections. An IPv4 address that IPv6 maps is an IPv4 address here."""

    ip: IPv4Address | IPv6Address
    port: int

    def __str__(self) -> str:
        return f"{self.ip}:{self.port}" if self.ip.version == 4 else f"[{self.ip}]:{self.port}"


async def listeners_of(pids: Iterable[int]) -> list[Listener]:
    """Where these processes listen, the lowest port first; a process that is gone listens nowhere.

    Raises OSError: PermissionError if a process doesn't let us look (it has more privileges than we have), and what
    this process itself lacks (file descriptors).
    """
    if sys.platform != "linux":
        found = {listener for pid in pids for listener in _listeners_by_psutil(pid)}
    else:
        inodes = {inode for pid in pids for inode in await _sockets_of(pid)}
        found = await _look_up(inodes)
    return sorted(found, key=lambda listener: (listener.port, str(listener.ip)))


def parse_listeners(table: bytes) -> Iterator[tuple[int, Listener]]:
    """The listening sockets among the lines of /proc/net/tcp or tcp6, with their inodes."""
    for address, port, inode in _LISTENS.findall(table):
        yield int(inode), Listener(_ip(address), int(port, 16))


def _ip(words: bytes) -> IPv4Address | IPv6Address:
    packed = b"".join(int(words[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(words), 8))
    return _unmapped(ip_address(packed))


def _unmapped(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    return ip.ipv4_mapped or ip if isinstance(ip, IPv6Address) else ip


async def _sockets_of(pid: int) -> set[int]:
    """The inodes of the sockets that a process holds open; empty if it is gone."""
    inodes = set()
    try:
        with os.scandir(f"/proc/{pid}/fd") as links:
            for count, link in enumerate(links, 1):
                target = _target(link)
                if target.startswith("socket:["):
                    inodes.add(int(target[8:-1]))
                if not count % _LINKS_AT_A_TIME:
                    await trio.lowlevel.checkpoint()
    except (FileNotFoundError, ProcessLookupError):
        return set()
    except PermissionError:
        stat = stat_of(pid)
        if stat is None or stat.state in ("Z", "X"):  # it has exited: the kernel lets nobody look any more
            return set()
        raise
    return inodes


def _target(link: "os.DirEntry[str]") -> str:
    try:
        return os.readlink(link.path)
    except (FileNotFoundError, ProcessLookupError):  # closed meanwhile
        return ""


async def _look_up(inodes: Collection[int]) -> set[Listener]:
    """The listeners among these sockets. Reads no more than it must, and lets other tasks run in between: a host with
    100,000 connections has tables of many megabytes. (Measured beside 800 connections: 0.3 ms where each socket of the
    process listens; 3.3 ms where one doesn't, since the kernel then walks all its connections.)"""
    missing, found = set(inodes), set()
    for path in _TABLES:
        for lines in _pieces(path) if missing else ():
            for inode, listener in parse_listeners(lines):
                if inode in missing:
                    missing.remove(inode)
                    found.add(listener)
            if not missing:
                break
            await trio.lowlevel.checkpoint()
    return found


def _pieces(path: str) -> Iterator[bytes]:
    """Whole lines of the file, as many as one read gives; none if it does not exist, as tcp6 without IPv6."""
    try:
        table = open(path, "rb", buffering=0)  # noqa: SIM115  (closed below)
    except FileNotFoundError:
        return
    with table:
        rest = b""
        while data := table.read(_READ_BYTES):
            lines, newline, rest = (rest + data).rpartition(b"\n")
            yield lines + newline


def _listeners_by_psutil(pid: int) -> list[Listener]:
    try:
        connections = psutil.Process(pid).net_connections("tcp")
    except psutil.AccessDenied as error:
        raise PermissionError(f"the sockets of process {pid} can't be seen") from error
    except psutil.NoSuchProcess:
        return []
    return [
        Listener(_unmapped(ip_address(connection.laddr.ip)), connection.laddr.port)
        for connection in connections
        if connection.status == psutil.CONN_LISTEN
    ]
