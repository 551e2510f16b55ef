import socket
from ipaddress import ip_network

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from worker.errors import AddressRefused, UriUnsupported
from worker.fetch.addresses import MAX_ADDRESSES, AddressRules, PublicResolver, check_url, shown

PUBLIC = ["8.8.8.8", "1.1.1.1", "185.199.108.153", "2606:4700::1111", "2a00:1450:4001::200e"]
TRANSLATED_PUBLIC = ["::8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::8.8.8.8", "2002:808:808::1"]
REFUSED = [
    "0.0.0.0",
    "0.1.2.3",
    "10.0.0.1",
    "100.64.0.1",
    "100.100.100.200",
    "127.0.0.1",
    "127.255.0.9",
    "168.63.129.16",
    "169.254.169.254",
    "172.16.0.1",
    "172.31.255.255",
    "192.0.0.192",
    "192.0.2.1",
    "192.88.99.1",
    "192.168.1.1",
    "198.18.0.1",
    "198.51.100.1",
    "203.0.113.1",
    "224.0.0.1",
    "239.255.255.250",
    "240.0.0.1",
    "255.255.255.255",
    "::",
    "::1",
    "::2",
    "::127.0.0.1",
    "::ffff:0.0.0.0",
    "::ffff:10.0.0.1",
    "::ffff:127.0.0.1",
    "::ffff:169.254.169.254",
    "64:ff9b::10.0.0.1",
    "64:ff9b::127.0.0.1",
    "64:ff9b:1::8.8.8.8",
    "100::1",
    "2001::1",
    "2001:0:a00:1::f5ff:fffe",
    "2001:db8::1",
    "2001:470:1f0b:1::5efe:10.0.0.1",
    "2001:470:1f0b:1:200:5efe:10.0.0.1",
    "2002:a00:1::1",
    "2002:7f00:1::1",
    "2002:a9fe:a9fe::1",
    "3fff::1",
    "5f00::1",
    "fc00::1",
    "fd00:ec2::254",
    "fe80::1",
    "fe80::1%2",
    "fe80::5efe:8.8.8.8",
    "fec0::1",
    "ff02::1",
    "ff0e::1",
]


class TestRules:
    @pytest.mark.parametrize("address", [*PUBLIC, *TRANSLATED_PUBLIC])
    def test_public_addresses_are_allowed(self, address: str) -> None:
        assert AddressRules().allows(address)

    @pytest.mark.parametrize("address", REFUSED)
    def test_everything_else_is_refused(self, address: str) -> None:
        assert not AddressRules().allows(address)
        with pytest.raises(AddressRefused, match="ALLOWED_NETWORKS"):
            AddressRules().check(address)

    def test_allowed_networks_are_allowed_in_any_notation(self) -> None:
        rules = AddressRules([ip_network("10.0.0.0/8"), ip_network("fd00::/8")])
        for address in ("10.1.2.3", "::ffff:10.1.2.3", "64:ff9b::10.1.2.3", "fd00::7", "fd00::7%3"):
            assert rules.allows(address), address
        for address in ("127.0.0.1", "192.168.0.1", "fe80::1", "fe80::5efe:10.0.0.1"):
            assert not rules.allows(address), address

    @given(st.ip_addresses(v=4))
    def test_an_embedded_address_is_never_more_allowed_than_itself(self, address: object) -> None:
        rules = AddressRules()
        for form in ("::ffff:{}", "64:ff9b::{}", "::{}", "2a00:1450::5efe:{}"):
            allowed = rules.allows(form.format(address))
            assert not allowed or rules.allows(str(address))

    def test_the_socket_is_refused_before_it_exists(self) -> None:
        info = (socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", ("127.0.0.1", 80))
        with pytest.raises(AddressRefused):
            AddressRules().socket_for(info)
        with AddressRules([ip_network("127.0.0.0/8")]).socket_for(info) as made:
            assert made.family == socket.AF_INET


class Answers(AbstractResolver):
    def __init__(self, *addresses: str) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=0,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        pass


class TestResolver:
    async def test_of_a_mix_only_the_public_remain(self) -> None:
        resolver = PublicResolver(Answers("10.0.0.1", "8.8.8.8", "::1"), AddressRules())
        assert [answer["host"] for answer in await resolver.resolve("h")] == ["8.8.8.8"]
        await resolver.close()

    async def test_a_name_without_a_public_address_is_refused(self) -> None:
        resolver = PublicResolver(Answers("10.0.0.1", "127.0.0.1"), AddressRules())
        with pytest.raises(AddressRefused, match="inner"):
            await resolver.resolve("inner.example")
        await resolver.close()

    async def test_a_name_with_many_addresses_is_reached_by_a_few(self) -> None:
        many = [f"{net}{low}" for low in range(250) for net in ("8.8.8.", "2606:4700::")]
        resolver = PublicResolver(Answers("10.0.0.1", *many), AddressRules())
        found = {answer["host"] for answer in await resolver.resolve("many.example")}
        assert found == set(many[: 2 * MAX_ADDRESSES]), "as many of either family"
        await resolver.close()


class TestUrls:
    @pytest.mark.parametrize(
        "url",
        [
            "http://cdn.example/a.mp3",
            "https://cdn.example:8443/a%20b.mp3?sig=1#x",
            "http://8.8.8.8/a",
            "http://[2606:4700::1111]/a",
            "http://[::ffff:8.8.8.8]/a",
            "http://4ad.example/a",
            "http://0xcafe.example/a",
            "http://bücher.example/a",
        ],
    )
    def test_ordinary_urls_pass(self, url: str) -> None:
        check_url(URL(url))

    @pytest.mark.parametrize(
        "url",
        [
            "http://2130706433/",
            "http://017700000001/",
            "http://0x7f000001/",
            "http://0x7f.1/",
            "http://0177.0.0.1/",
            "http://127.1/",
            "http://127.0.0.1./",
            "http://127.0.0.01/",
            "http://1.2.3.0x4/",
            "http://[fe80::1%251]/",
            "http://user:secret@cdn.example/",
            "http://user@cdn.example/",
            "http://:secret@cdn.example/",
        ],
    )
    def test_disguises_and_credentials_are_refused(self, url: str) -> None:
        with pytest.raises(AddressRefused) as failure:
            check_url(URL(url))
        assert "secret" not in failure.value.message

    @pytest.mark.parametrize("url", ["ftp://h/a", "gopher://h/", "//h/a", "a.mp3", "http:///a"])
    def test_other_schemes_and_missing_hosts_are_unsupported(self, url: str) -> None:
        with pytest.raises(UriUnsupported):
            check_url(URL(url))


@pytest.mark.parametrize(
    ("uri", "text"),
    [
        ("https://h/a.mp3?X-Signature=secret", "https://h/a.mp3"),
        ("https://user:secret@h/a.mp3", "https://h/a.mp3"),
        ("s3://AKIA:sec/re+t@b/a.mp3", "s3://b/a.mp3"),
        ("https://user:sec#r?e/t@h:80/a.mp3", "https://h:80/a.mp3"),
        ("https://h:80/a@b", "https://h:80/a@b"),
        ("https://[::1]/a@b", "https://[::1]/a@b"),
        ("s3://b/" + "x" * 500, "s3://b/" + "x" * 193 + "..."),
        ("http://h/\x1b[2Jü", "http://h/?[2J\\xfc"),
    ],
)
def test_what_is_shown_of_a_uri_is_short_and_without_secrets(uri: str, text: str) -> None:
    assert shown(uri) == text
