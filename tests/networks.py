"""A small internet for tests: servers on networks of this machine, which a session's egress proxy joins."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import docker
import pytest

from sandbox_kernel.provisioning.egress_image import is_egress_current

SERVER = """
import http.server, socket, ssl, threading
deaf = socket.create_server(("0.0.0.0", 9))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = b"hello from " + self.headers.get("Host", "").encode()
        self.send_response(200); self.send_header("Content-Length", str(len(body))); self.end_headers()
        self.wfile.write(body)
    def log_message(self, *_): pass
for port in (80, 443, 8443, 8080, 22):
    server = http.server.ThreadingHTTPServer(("0.0.0.0", port), Handler)
    if port in (443, 8443):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain("/tmp/cert.pem", "/tmp/key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever).start()
print("up", flush=True)
"""
CERTIFICATE = (
    "openssl req -x509 -newkey rsa:2048 -nodes -keyout /tmp/key.pem -out /tmp/cert.pem -days 2 -subj /CN=public.test"
    " -addext 'subjectAltName=DNS:public.test,DNS:*.wild.test' 2>/dev/null"
)
PUBLIC = ("public.test", "a.wild.test", "b.a.wild.test", "wild.test", "unlisted.test", "xn--bcher-kva.test")


@dataclass
class Internet:
    """``public`` has an address of the internet's, ``private`` one that is not; ``mixed.test`` has one of each."""

    client: docker.DockerClient
    networks: dict[str, str]
    public: str
    private: str
    certificate: str

    def join(self, kernel_id: str) -> None:
        """Let the proxy of that kernel reach the servers and their names."""
        (proxy,) = self.client.containers.list(filters={"label": f"sandbox-kernel.egress={kernel_id}"})
        for network in self.networks.values():
            self.client.networks.get(network).connect(proxy)


@pytest.fixture(scope="session")
def egress_image(engine: docker.DockerClient) -> None:
    """``sandbox-egress:latest``, made from this checkout's recipe."""
    from conftest import _missing

    if not is_egress_current():
        _missing("sandbox-egress:latest is not on the engine, or made from another recipe", "make image")


@pytest.fixture(scope="module")
def internet(
    engine: docker.DockerClient, image: str, egress_image: None, tmp_path_factory: object
) -> Iterator[Internet]:
    tag, number = secrets.token_hex(3), secrets.randbelow(250)
    with ExitStack() as undo:
        networks, addresses = {}, {}
        for kind, subnet in (("public", f"11.77.{number}"), ("private", f"10.77.{number}")):
            pool = docker.types.IPAMPool(subnet=f"{subnet}.0/24")
            network = engine.networks.create(f"test-{kind}-{tag}", ipam=docker.types.IPAMConfig(pool_configs=[pool]))
            undo.callback(network.remove)
            undo.callback(_leave, network)
            networks[kind], addresses[kind] = network.name, f"{subnet}.9"
        command = f"{CERTIFICATE}; cat /tmp/cert.pem; exec python3 -u -c '{SERVER}'"
        server = engine.containers.create(image, ["sh", "-c", command], user="0", name=f"test-server-{tag}")
        undo.callback(server.remove, force=True)
        names = {"public": [*PUBLIC, "mixed.test"], "private": ["rebound.test", "mixed.test"]}
        engine.networks.get("bridge").disconnect(server)
        for kind in networks:
            engine.networks.get(networks[kind]).connect(server, ipv4_address=addresses[kind], aliases=names[kind])
        server.start()
        text = ""
        for chunk in server.logs(stream=True, follow=True):
            text += chunk.decode()
            if text.endswith("up\n"):
                break
        yield Internet(engine, networks, addresses["public"], addresses["private"], text.removesuffix("up\n"))


def _leave(network: docker.models.networks.Network) -> None:
    network.reload()
    for container in network.containers:
        network.disconnect(container, force=True)
