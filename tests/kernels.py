"""Provisioned kernels for tests: launched as a session launches them, spoken to by jupyter_client's own client."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import docker
from jupyter_client.asynchronous.client import AsyncKernelClient

from sandbox_kernel.provisioning.container import ContainerSpec
from sandbox_kernel.provisioning.docker import DockerProvisioner
from sandbox_kernel.provisioning.runtime import RuntimeDirectory
from sandbox_kernel.settings import Settings


def spec(root: Path, session_id: str | None = "conv", **overrides: Any) -> ContainerSpec:
    """A session's container with settings other than the default."""
    return ContainerSpec(
        settings=Settings(sessions_root=root, **overrides),
        kernel_id=secrets.token_hex(6),
        session_id=session_id,
        root=root,
    )


def provisioner(wanted: ContainerSpec) -> DockerProvisioner:
    return DockerProvisioner(kernel_id=wanted.kernel_id, spec=wanted)


@asynccontextmanager
async def client_of(info: Any) -> AsyncIterator[AsyncKernelClient]:
    """A client that has had the kernel's first answer."""
    client = AsyncKernelClient()
    client.load_connection_info(info)
    client.start_channels()
    try:
        await client.wait_for_ready(timeout=30)
        yield client
    finally:
        client.stop_channels()


async def evaluate(client: AsyncKernelClient, code: str, timeout: float = 30) -> str:
    """What ``code`` printed. Fails when it raised."""
    texts: list[str] = []

    def hook(message: dict[str, Any]) -> None:
        if message["header"]["msg_type"] == "stream":
            texts.append(message["content"]["text"])

    async with asyncio.timeout(timeout):
        reply = await client.execute_interactive(code, output_hook=hook, timeout=timeout, allow_stdin=False)
    assert reply["content"]["status"] == "ok", reply["content"]
    return "".join(texts)


@asynccontextmanager
async def kernel(wanted: ContainerSpec) -> AsyncIterator[tuple[DockerProvisioner, AsyncKernelClient]]:
    """A launched container and a client; removed at the end."""
    host = provisioner(wanted)
    info = await host.launch()
    try:
        async with client_of(info) as client:
            yield host, client
    finally:
        await host.remove()


def everything_gone(client: docker.DockerClient, wanted: ContainerSpec) -> None:
    """No container, runtime directory or connection file of this kernel."""
    assert client.containers.list(all=True, filters={"label": f"sandbox-kernel.kernel={wanted.kernel_id}"}) == []
    runtime = RuntimeDirectory(wanted.kernel_id)
    assert not runtime.path.exists()
    assert not runtime.connection_file.exists()
