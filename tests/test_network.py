"""Network as a list of hosts: what is let through, what is not, and that each stands in the log."""

from __future__ import annotations

import ast
import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st

from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.errors import SettingsError
from sandbox_kernel.hosts import HostRule, parse_hosts
from sandbox_kernel.provisioning.squid import configuration, read_line
from sandbox_kernel.session import Session

if TYPE_CHECKING:
    from networks import Internet

pytest_plugins = ["networks"]


def traffic(session: Session) -> list[dict[str, Any]]:
    assert session.directory is not None
    entries = [json.loads(line) for line in (session.directory / "session.log").read_text().splitlines()]
    return [entry for entry in entries if entry["event"].startswith("network_")]


async def logged(session: Session, before: int, count: int) -> list[dict[str, Any]]:
    """The traffic after the first ``before`` lines, once there are ``count`` more."""
    for _ in range(500):
        if len(found := traffic(session)[before:]) >= count:
            return found
        await asyncio.sleep(0.02)
    raise AssertionError(f"{count} lines expected, there are {found}")


async def told(session: Session, code: str) -> Any:
    """What the cell printed, as a Python literal."""
    result = await session.execute(code, timeout=60)
    assert result.success, result.error
    return ast.literal_eval(result.stdout)


# --- the setting ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "kept"),
    [
        ("pypi.org", "pypi.org"),
        (" PyPI.org. ", "pypi.org"),
        ("*.Example.org:8443", "*.example.org:8443"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("a_b.example", "a_b.example"),
        ("localhost:80", "localhost:80"),
        ("10.0.0.5:8080", "10.0.0.5:8080"),
    ],
)
def test_hosts_are_kept_in_one_form(entry: str, kept: str) -> None:
    assert Settings(network=[entry, kept]).network == [kept]


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("https://pypi.org", "without scheme"),
        ("pypi.org/simple", "without scheme"),
        ("user@pypi.org", "without scheme"),
        ("*", "network='full'"),
        ("*.org", "top-level"),
        ("py*.org", "whole labels"),
        ("a.*.org", "whole labels"),
        ("pypi.org:0", "port"),
        ("pypi.org:65536", "port"),
        ("pypi.org:https", "port"),
        ("[::1]:80", "IPv6"),
        ("::1", "IPv6"),
        ("127.1", "1.2.3.4"),
        ("0x7f.0.0.1", "1.2.3.4"),
        ("2130706433", "1.2.3.4"),
        ("*.1.2.3.4", "no names below"),
        ("", "labels"),
        ("a..b", "labels"),
        ("a b", "labels"),
        ("a\nhttp_access allow all", "labels"),
        ("-a.org", "labels"),
        (f"{'a' * 64}.org", "labels"),
    ],
)
def test_a_bad_host_is_named(entry: str, why: str) -> None:
    with pytest.raises(SettingsError) as caught:
        Settings(network=["pypi.org", entry])
    assert repr(entry) in str(caught.value)
    assert why in str(caught.value)
    assert "'network'" in str(caught.value)


def test_lists_that_make_no_sense() -> None:
    with pytest.raises(SettingsError, match="network='none'"):
        Settings(network=[])
    with pytest.raises(SettingsError, match="more than 300"):
        Settings(network=[f"h{number}.example.org" for number in range(301)])
    with pytest.raises(SettingsError, match="needs a container"):
        Settings(network=["pypi.org"], engine="local")


def test_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SANDBOX_NETWORK", '["PyPI.org", "*.example.org"]')
    assert Settings().network == ["pypi.org", "*.example.org"]


@given(st.text(max_size=60) | st.from_regex(r"\A(\*\.)?[a-z0-9.-]{1,30}(:[0-9]{1,6})?\Z"))
def test_no_entry_says_more_to_the_proxy_than_a_host(entry: str) -> None:
    try:
        rule = HostRule.parse(entry)
    except ValueError:
        return
    assert HostRule.parse(str(rule)) == rule
    plain = configuration(parse_hosts(["x.org"]), address="198.18.0.3", subnet="198.18.0.0/29")
    with_it = configuration([rule, *parse_hosts(["x.org"])], address="198.18.0.3", subnet="198.18.0.0/29")
    directives = {"acl", "http_access"} | {line.split()[0] for line in plain.splitlines() if line}
    assert {line.split()[0] for line in with_it.splitlines() if line} <= directives
    assert len(with_it.splitlines()) <= len(plain.splitlines()) + 5


@given(st.text() | st.text().map(lambda text: "{" + text) | st.dictionaries(st.text(), st.text()).map(json.dumps))
def test_whatever_the_proxy_prints_is_read(line: str) -> None:
    read_line(line)


# --- in a session -----------------------------------------------------------------------------

HOSTS = ["public.test", "*.wild.test", "public.test:8443", "rebound.test", "mixed.test", "nowhere.test", "Bücher.test"]
CONNECT = """
import os, socket
def connect(target, request=None):
    address, port = os.environ["HTTPS_PROXY"].removeprefix("http://").split(":")
    with socket.create_connection((address, int(port)), 20) as proxy:
        proxy.sendall((request or f"CONNECT {target} HTTP/1.1\\r\\nHost: {target}\\r\\n\\r\\n").encode())
        return int(proxy.recv(4096).split()[1])
"""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def session(internet: Internet, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Session]:
    root = tmp_path_factory.mktemp("network")
    settings = Settings(sessions_root=root / "sessions", network=[*HOSTS, f"{internet.private}:8080"])
    async with SessionManager(settings) as manager:
        session = await manager.start("listed")
        internet.join(json.loads((root / "sessions/listed/session_metadata.json").read_text())["kernel_id"])
        await session.execute(CONNECT)
        yield session


@pytest.mark.asyncio(loop_scope="module")
class TestListed:
    async def test_http_to_a_listed_host(self, session: Session, internet: Internet) -> None:
        before = len(traffic(session))
        code = "import urllib.request\nprint(repr(urllib.request.urlopen('http://Public.TEST/a?b=c').read()))"
        assert await told(session, code) == b"hello from public.test"
        (line,) = await logged(session, before, 1)
        expected = {"event": "network_connection", "host": "public.test", "port": 80, "method": "GET"}
        assert {name: line[name] for name in expected} == expected
        assert line["address"] == internet.public
        assert line["bytes_received"] > 20
        assert line["bytes_sent"] > 20
        assert "b=c" not in json.dumps(line)

    async def test_https_is_a_tunnel_end_to_end(self, session: Session, internet: Internet) -> None:
        before = len(traffic(session))
        code = f"""
import ssl, urllib.request
context = ssl.create_default_context(cadata={internet.certificate!r})
print([urllib.request.urlopen(url, context=context).read() for url in
    ("https://public.test/", "https://public.test:8443/", "https://a.wild.test/")])
"""
        assert await told(session, code) == [
            b"hello from public.test",
            b"hello from public.test:8443",
            b"hello from a.wild.test",
        ]
        found = await logged(session, before, 3)
        assert [(line["host"], line["port"], line["method"]) for line in found] == [
            ("public.test", 443, "CONNECT"),
            ("public.test", 8443, "CONNECT"),
            ("a.wild.test", 443, "CONNECT"),
        ]

    async def test_what_is_let_through_and_what_is_not(self, session: Session, internet: Internet) -> None:
        private, public = internet.private, internet.public
        third, fourth = (int(part) for part in private.split(".")[2:])
        let_through = [
            "PUBLIC.test:443", "public.test.:443", "public.test:80", "b.a.wild.test:443", f"{private}:8080",
            "xn--bcher-kva.test:443",
        ]  # fmt: skip
        not_listed = [
            "unlisted.test:443", "wild.test:443", "public.test:22", "a.wild.test:8443", "public.test.evil.test:443",
            "xpublic.test:443", f"{public}:443", f"{private}:443", "127.0.0.1:80", "localhost:80", "0.0.0.0:80",
            "[::1]:80", "[::ffff:127.0.0.1]:80", "0x7f.1:80", "2130706433:80", "169.254.169.254:80", "172.17.0.1:22",
            f"10.77.{third * 256 + fourth}:443", "8.8.8.8:443",
        ]  # fmt: skip
        inward = ["rebound.test:443", "rebound.test:80", "mixed.test:443"]
        before = len(traffic(session))
        targets = let_through + not_listed + inward
        answers = await told(session, f"print([connect(target) for target in {targets!r}])")
        assert dict(zip(targets, answers, strict=True)) == dict.fromkeys(let_through, 200) | dict.fromkeys(
            not_listed + inward, 403
        )
        found = await logged(session, before, len(targets))
        assert [line["event"] for line in found] == ["network_connection"] * len(let_through) + ["network_refused"] * (
            len(not_listed) + len(inward)
        )
        reasons = [line["reason"] for line in found if line["event"] == "network_refused"]
        assert reasons == ["not in the setting network"] * len(not_listed) + [
            "it resolves to an address inside a private network"
        ] * len(inward)
        hosts = [line["host"] for line in found]
        assert hosts[:2] == ["public.test", "public.test"]
        assert hosts[len(let_through) :][:2] == ["unlisted.test", "wild.test"]

    async def test_a_listed_host_that_is_not_there(self, session: Session) -> None:
        before = len(traffic(session))
        assert await told(session, "print(connect('nowhere.test:443'))") == 503
        (line,) = await logged(session, before, 1)
        assert (line["event"], line["error"]) == ("network_connection", "the name does not resolve")

    async def test_other_protocols_and_the_proxys_own_pages(self, session: Session) -> None:
        urls = [
            "ftp://public.test/", "https://public.test/", "urn:isbn:1", "whois://public.test/", "cache_object://public.test/info",
            "http://public.test/squid-internal-mgr/menu", "http://public.test@unlisted.test/", "http://public.test:8080/",
        ]  # fmt: skip
        code = f"print([connect('', f'GET {{url}} HTTP/1.1\\r\\nHost: public.test\\r\\n\\r\\n') for url in {urls!r}])"
        assert await told(session, code) == [403] * len(urls)
        strange = ["GARBAGE", "CONNECT public.test%00.evil.test:443 HTTP/1.1", "GET /squid-internal-mgr/info HTTP/1.1"]
        code = f"print([connect('', line + '\\r\\n\\r\\n') for line in {strange!r}])"
        assert set(await told(session, code)) <= {400, 403}

    async def test_there_is_no_other_way_out(self, session: Session, internet: Internet) -> None:
        code = f"""
import os, socket
from concurrent.futures import ThreadPoolExecutor
proxy = os.environ["HTTPS_PROXY"].removeprefix("http://").split(":")[0]
first, last = proxy.rsplit(".", 1)
mine = socket.gethostbyname(socket.gethostname())
places = {{f"{{first}}.{{number}}" for number in range(int(last) - 3, int(last) + 5)}} - {{mine}}
places |= {{{internet.public!r}, {internet.private!r}, "172.17.0.1", "169.254.169.254", "8.8.8.8"}}

def tcp(place):
    with socket.socket() as connection:
        connection.settimeout(1)
        return place if connection.connect_ex(place) == 0 else None

def udp(address):
    query = b"\\x12\\x34\\x01\\x00\\x00\\x01" + b"\\x00" * 6 + b"\\x06public\\x04test\\x00\\x00\\x01\\x00\\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
        datagrams.settimeout(1)
        try:
            datagrams.sendto(query, (address, 53))
            return address if datagrams.recv(512)[7] else None
        except OSError:
            return None

def ping(kind):
    try:
        with socket.socket(socket.AF_INET, kind, socket.IPPROTO_ICMP) as icmp:
            icmp.settimeout(1)
            icmp.sendto(b"\\x08\\x00\\xf7\\xff\\x00\\x00\\x00\\x00", ({internet.public!r}, 0))
            return icmp.recv(100)
    except OSError:
        return None

def resolve(name):
    try:
        return socket.getaddrinfo(name, 80)
    except OSError:
        return None

with ThreadPoolExecutor(100) as pool:
    ports = (22, 53, 80, 443, 2375, 3128, 8080)
    found = [*pool.map(tcp, [(place, port) for place in places for port in ports])]
    found += pool.map(udp, ["127.0.0.11", "8.8.8.8", *places])
    found += pool.map(ping, [socket.SOCK_RAW, socket.SOCK_DGRAM])
    found += pool.map(resolve, ["public.test", "a.wild.test", "example.org"])
links = [line for line in open("/proc/net/if_inet6").read().splitlines() if not line.endswith(" lo")]
print([answer for answer in found if answer is not None] == [(proxy, 3128)] and links == [])
"""
        assert await told(session, code) is True

    async def test_the_proxy_has_no_more_than_it_needs(self, session: Session, internet: Internet) -> None:
        assert session.container_id is not None
        kernel = internet.client.containers.get(session.container_id)
        (own,) = kernel.attrs["NetworkSettings"]["Networks"]
        network = internet.client.networks.get(own)
        assert network.attrs["Internal"]
        (proxy,) = [container for container in network.containers if container.id != kernel.id]
        host = proxy.attrs["HostConfig"]
        assert (host["ReadonlyRootfs"], host["CapDrop"], host["Privileged"]) == (True, ["ALL"], False)
        assert proxy.attrs["Config"]["User"].split(":")[0] not in ("", "0")
        assert "sandbox-kernel.session" not in proxy.labels
        # The host has no address on the bridge: none of its services can be spoken to.
        bridge = ["ip", "-o", "addr", "show", "dev", f"br-{network.id[:12]}"]
        assert "inet " not in subprocess.run(bridge, capture_output=True, text=True, check=True).stdout

    async def test_a_flood_of_refusals_does_not_fill_the_log(self, session: Session) -> None:
        before, count = len(traffic(session)), 3000
        code = f"""
address, port = os.environ["HTTPS_PROXY"].removeprefix("http://").split(":")
with socket.create_connection((address, int(port))) as proxy:
    for number in range({count}):
        proxy.sendall(f"GET http://h{{number}}.test/ HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n".encode())
        got = b""
        while b"\\r\\n\\r\\n" not in got: got = proxy.recv(65536)
print(True)
"""
        assert await told(session, code)
        found: list[dict[str, Any]] = []
        for _ in range(500):
            found = traffic(session)[before:]
            seen = sum(line.get("refusals", 1) for line in found)
            if seen >= count:
                break
            await asyncio.sleep(0.02)
        assert seen == count
        assert len(found) < 1000
        assert found[-1]["event"] == "network_gathered"
