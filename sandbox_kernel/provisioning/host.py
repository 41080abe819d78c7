"""Which provisioner a session's kernel is launched by."""

from __future__ import annotations

from sandbox_kernel.provisioning.container import ContainerSpec
from sandbox_kernel.provisioning.docker import DockerProvisioner
from sandbox_kernel.provisioning.local import LocalHostProvisioner

KernelHost = DockerProvisioner | LocalHostProvisioner


def kernel_host(spec: ContainerSpec) -> KernelHost:
    """The provisioner of ``spec.settings.engine``, not launched yet."""
    kind = LocalHostProvisioner if spec.settings.engine == "local" else DockerProvisioner
    return kind(kernel_id=spec.kernel_id, spec=spec)
