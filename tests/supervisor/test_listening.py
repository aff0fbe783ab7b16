"""The tables of the kernel's sockets, as recorded."""

import sys
from ipaddress import IPv4Address, IPv6Address

import pytest

from supervisor.listening import Listener, parse_listeners

HEAD = b"  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"
# Recorded on x86_64, Linux 6.18: a listener on 127.0.0.1:39541 and one on all addresses, and both ends of a connection.
TCP = HEAD + (
    b"   0: 00000000:07E8 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 126 1 "
    b"00000000a22d4808 100 0 0 10 0                       \n"
    b"   1: 0100007F:9A75 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 110528 1 "
    b"000000008a130884 100 0 0 10 0                       \n"
    b"   2: 0100007F:9A75 0100007F:D2F0 01 00000000:00000000 00:00000000 00000000  1000        0 110600 1 "
    b"0000000000000000 20 4 30 10 -1                      \n"
    b"   3: 0100007F:D2F0 0100007F:9A75 06 00000000:00000000 03:0000176F 00000000     0        0 0 3 "
    b"0000000000000000                                    \n"
)
TCP6 = HEAD + (
    b"   0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 00000000:00000000 "
    b"00:00000000 00000000     0        0 7001 1 0000000000000000 100 0 0 10 0\n"
    b"   1: 0000000000000000FFFF00000100007F:1F91 00000000000000000000000000000000:0000 0A 00000000:00000000 "
    b"00:00000000 00000000     0        0 7002 1 0000000000000000 100 0 0 10 0\n"
)

pytestmark = pytest.mark.skipif(sys.byteorder != "little", reason="hardware: the tables are in the host's byte order")


def test_only_listening_sockets_are_found_with_their_inodes() -> None:
    assert list(parse_listeners(TCP)) == [
        (126, Listener(IPv4Address("0.0.0.0"), 2024)),
        (110528, Listener(IPv4Address("127.0.0.1"), 39541)),
    ]


def test_an_ipv4_address_that_ipv6_maps_is_one() -> None:
    found = dict(parse_listeners(TCP6))
    assert found == {7001: Listener(IPv6Address("::1"), 8080), 7002: Listener(IPv4Address("127.0.0.1"), 8081)}
    assert list(map(str, found.values())) == ["[::1]:8080", "127.0.0.1:8081"]


@pytest.mark.parametrize(
    "table",
    [
        b"",
        HEAD,
        TCP[: len(HEAD) + 40],
        b"   0: 0100007F:9A75 00000000:0000 0A\n",
        b"   0: 0100007F0100007F:9A75 00000000:0000 0A 0:0 0:0 0     0        0 110528 1\n",
        b"   0: 0100007F:99999999999999999999 00000000:0000 0A 0:0 0:0 0     0        0 110528 1\n",
    ],
    ids=["empty", "head", "cut off", "short", "no address", "no port"],
)
def test_what_is_no_line_of_the_table_is_passed_over(table: bytes) -> None:
    assert list(parse_listeners(table)) == []
