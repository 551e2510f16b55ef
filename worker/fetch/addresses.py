"""Which addresses Timbre connects to, and which it refuses.

Events name the addresses that a worker fetches from, so an event could make it speak to services
behind the firewall. Only public addresses are spoken to, and those that configuration allows. The
decision falls on the numeric address in the moment of connecting (`AddressRules.socket_for`),
after every redirect and whatever the name resolved to before: a name that changes its mind gains
nothing.
"""

import re
import socket
from collections.abc import Iterator, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any

from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from worker.errors import AddressRefused, UriUnsupported

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_SHOWN_CHARS = 200
MAX_ANSWERS = 64  # of a name that are looked at
# Of each family. Where none takes a connection aiohttp tries all, then all but one, and so on: the
# 500 addresses of one name would be 250,000 connections.
MAX_ADDRESSES = 3

# Globally routed by the registry (or by Python's reading of it), yet never a music platform's.
SPECIAL = (
    ip_network("168.63.129.16/32"),  # Azure's platform services, reachable from any VM
    ip_network("192.0.0.0/24"),  # protocol assignments; Oracle's metadata service
    ip_network("192.88.99.0/24"),  # 6to4 relays
    ip_network("3fff::/20"),  # documentation
)
GLOBAL_UNICAST = ip_network("2000::/3")
NAT64 = ip_network("64:ff9b::/96")
V4_MAPPED = ip_network("::ffff:0:0/96")
V4_COMPATIBLE = ip_network("::/96")
ISATAP = (0x0000_5EFE, 0x0200_5EFE)

HOST = re.compile(r"[A-Za-z0-9_.-]+|[0-9A-Fa-f:.]+(?:%.*)?")  # a name as DNS has it, or IPv6
# What inet_aton would take for an address: 2130706433, 0x7f.1, 0177.0.0.1, 127.1.
NUMERIC_HOST = re.compile(r"(?:.*\.)?(?:\d+|0x[0-9a-f]*)\.?", re.IGNORECASE)
DOTTED_QUAD = re.compile(r"(?:(?:0|[1-9]\d{0,2})\.){3}(?:0|[1-9]\d{0,2})")
# Before a host, also where a slash in the password ends what is read as one: half of S3's have one.
CREDENTIALS = re.compile(r"(?<=//)(?:[^/?#]*|[^/?#:\[]*:(?!\d*(?:[/?#]|$)).{1,200})@", re.DOTALL)


class AddressRules:
    """Public addresses, and those in `allowed_networks`."""

    def __init__(self, allowed_networks: Sequence[Network] = ()) -> None:
        self._allowed = tuple(allowed_networks)

    def allows(self, address: str) -> bool:
        """Whether to connect to a numeric address; an IPv6 one may name a zone (`fe80::1%2`)."""
        own = ip_address(address.partition("%")[0])
        return self._in_allowed(own) or all(
            _is_public(face) or self._in_allowed(face) for face in (own, *_embedded(own))
        )

    def _in_allowed(self, address: Address) -> bool:
        return any(address in network for network in self._allowed)

    def check(self, address: str, host: str | None = None) -> None:
        """Raise `AddressRefused` where `allows` says no; `host` is the name that led there."""
        if not self.allows(address):
            whose = f"{address} (of {shown(host)})" if host and host != address else address
            raise AddressRefused(
                f"The address {whose} is not public. If tracks really lie there, add its network "
                "to TIMBRE_FETCH__ALLOWED_NETWORKS."
            )

    def socket_for(self, addr_info: tuple[Any, ...]) -> socket.socket:
        """A socket for the address about to be connected to: aiohttp's `socket_factory`.

        Literal addresses and resolved names alike pass here, after all else that can choose.
        """
        family, kind, protocol, _, address = addr_info
        self.check(address[0])
        return socket.socket(family, kind, protocol)


class PublicResolver(AbstractResolver):
    """The first few of another resolver's answers, less those that `rules` refuse.

    A name with public and private addresses is thus always reached by the public ones, not refused
    at times by the order of the answers.
    """

    def __init__(self, inner: AbstractResolver, rules: AddressRules) -> None:
        self._inner = inner
        self._rules = rules

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        answers = (await self._inner.resolve(host, port, family))[:MAX_ANSWERS]
        allowed = [answer for answer in answers if self._rules.allows(answer["host"])]
        if answers and not allowed:
            self._rules.check(answers[0]["host"], host)
        return _few(allowed)

    async def close(self) -> None:
        await self._inner.close()


def check_url(url: URL) -> None:
    """Raise what is wrong with a URL before anything is looked up.

    Raises
    ------
    UriUnsupported
        Not http or https, or without a host.
    AddressRefused
        Credentials in the URL, or a host written as a number in disguise.
    """
    if url.scheme not in {"http", "https"}:
        raise UriUnsupported(
            f"Scheme {shown(url.scheme)!r} is not fetched; use https, http, s3, gs, az or file."
        )
    if not HOST.fullmatch(url.raw_host or "") or url.port == 0:
        raise UriUnsupported("The URL names no host to fetch from; write https://host/path.")
    if url.raw_user is not None or url.raw_password is not None:
        raise AddressRefused(
            "The URL carries credentials, which would end up in logs and events; "
            "use a signed URL or a configured object store."
        )
    host = url.raw_host or ""
    if "%" in host:
        raise AddressRefused("The URL's host names an interface of this machine.")
    if ":" not in host and NUMERIC_HOST.fullmatch(host) and not DOTTED_QUAD.fullmatch(host):
        raise AddressRefused(
            f"The host {shown(host)} is a number in disguise; write a name or a dotted address "
            "such as 192.0.2.1."
        )


def shown(text: str) -> str:
    """Foreign text for a message: no query (it may be signed), no credentials, short, printable."""
    plain = CREDENTIALS.sub("", text).partition("?")[0].partition("#")[0]
    plain = plain.encode("ascii", "backslashreplace").decode()
    plain = "".join(char if char.isprintable() else "?" for char in plain)
    return plain if len(plain) <= MAX_SHOWN_CHARS else f"{plain[:MAX_SHOWN_CHARS]}..."


def _few(answers: list[ResolveResult]) -> list[ResolveResult]:
    by_family: dict[int, list[ResolveResult]] = {}
    for answer in answers:
        by_family.setdefault(answer["family"], []).append(answer)
    return [answer for family in by_family.values() for answer in family[:MAX_ADDRESSES]]


def _is_public(address: Address) -> bool:
    if any(address in network for network in SPECIAL):
        return False
    if isinstance(address, IPv6Address):
        if _is_translated(address):
            return True  # as public as the IPv4 address it stands for, which is asked as well
        return address in GLOBAL_UNICAST and address.is_global
    return address.is_global and not address.is_multicast


def _embedded(address: Address) -> Iterator[IPv4Address]:
    """The IPv4 addresses that packets to an IPv6 address may end up at."""
    if isinstance(address, IPv4Address):
        return
    low = IPv4Address(int(address) & 0xFFFF_FFFF)
    if _is_translated(address) or (int(address) >> 32) & 0xFFFF_FFFF in ISATAP:
        yield low
    elif address.sixtofour is not None:
        yield address.sixtofour
    elif address.teredo is not None:
        yield from address.teredo


def _is_translated(address: IPv6Address) -> bool:
    """Whether an address is nothing but an IPv4 address in another notation."""
    compatible = address in V4_COMPATIBLE and int(address) > 1  # :: and ::1 are themselves
    return compatible or address in V4_MAPPED or address in NAT64
