"""A kernel that was just launched: it answers, or it dies before it does; and who launches it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from sandbox_kernel.errors import KernelStartError
from sandbox_kernel.events import KernelDeath
from sandbox_kernel.feed import Feed
from sandbox_kernel.kernel import Kernel


class DiedAtStart(KernelStartError):
    """The kernel ended before it answered."""


class Provisioner(Protocol):
    """What the lifecycle needs of ``provisioning.docker.DockerProvisioner`` and its kin."""

    container_id: str | None
    host_port: int | None

    @property
    def connection_file(self) -> Path | None:
        """The client's connection file."""

    async def launch(self) -> Mapping[str, Any]:
        """Start a kernel where there is none (again); returns its connection info."""

    async def attach(self, container_id: str) -> Mapping[str, Any]:
        """Take over a living container; returns its kernel's connection info."""

    async def restart_in_place(self) -> Mapping[str, Any]:
        """Kill the kernel process and start a fresh one in the same container."""

    async def wait_dead(self) -> KernelDeath:
        """Return when the kernel's container has died, or was paused from outside, with the cause."""

    async def remove(self) -> None:
        """End the kernel and remove everything that belongs to it; done already is done."""

    def detach(self) -> None:
        """Let go of a kernel that lives on."""


async def answered(
    provisioner: Provisioner, kernel: Kernel, feed: Feed | None, *, timeout: float
) -> asyncio.Future[KernelDeath]:
    """Connect to a kernel that was just launched; what tells of its death from now on.

    Raises KernelStartError when it dies or does not answer within ``timeout`` seconds; the connection is closed then.
    """
    dead = asyncio.ensure_future(provisioner.wait_dead())
    answer = asyncio.ensure_future(kernel.connect(feed, timeout=timeout))
    try:
        await asyncio.wait((dead, answer), return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            death = await dead
            raise DiedAtStart(f"the kernel died while it started: {death.message}")
        await answer
    except BaseException:
        dead.cancel()
        answer.cancel()
        with suppress(BaseException):
            await asyncio.gather(dead, answer, return_exceptions=True)
        kernel.close()
        raise
    return dead
