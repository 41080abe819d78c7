"""The image that smolagents' Docker executor is driven in: the one that is measured, and jupyter_kernel_gateway.

Versions of what both have are those of the measured image, so that the same kernel is compared. The image stays on
the engine under :data:`TAG` with the hash of its recipe, as ours do: an unchanged one costs nothing, also where no
registry answers.
"""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from sandbox_kernel.provisioning.engine import tar
from sandbox_kernel.provisioning.image import download_wheels, engine_client, recipe_of, run_build

TAG = "sandbox-benchmark:kernel-gateway"
WANTED = "jupyter_kernel_gateway>=3,<4"
DOCKERFILE = f"""\
ARG BASE
FROM ${{BASE}}
USER 0:0
COPY wheels /wheels
RUN python3 -m ensurepip >/dev/null \\
 && python3 -m pip install --quiet --disable-pip-version-check --no-index --find-links=/wheels '{WANTED}' \\
 && python3 -m pip uninstall --yes --quiet pip \\
 && rm -r /wheels
USER 1000:1000
CMD ["python3", "-m", "kernel_gateway", "--KernelGatewayApp.ip=0.0.0.0", "--KernelGatewayApp.port=8888"]
"""
_VERSIONS = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()), sep='\\n')"


@cache
def gateway_image(base: str) -> str:
    """Its tag, built upon ``base`` unless it is current; a minute or two. Raises EngineError naming what failed."""
    with engine_client() as client:
        found = client.inspect_image(base)
        recipe = hashlib.sha256(f"{found['Id']}\n{DOCKERFILE}".encode()).hexdigest()
        if recipe_of(client, TAG) == recipe:
            return TAG
        _say(f"{TAG}, upon {base}")
        look = ["docker", "run", "--rm", "--network", "none", "--entrypoint", "python3", base, "-c", _VERSIONS]
        with tempfile.TemporaryDirectory(prefix="benchmark-wheels-") as folder:
            versions = Path(folder) / "versions"
            versions.write_bytes(subprocess.run(look, check=True, capture_output=True).stdout)
            wheels = Path(folder) / "wheels"
            download_wheels(wheels, found["Architecture"], ["--constraint", str(versions), WANTED], _say)
            files = {f"wheels/{wheel.name}": wheel.read_bytes() for wheel in wheels.iterdir()}
        context = io.BytesIO(tar({"Dockerfile": DOCKERFILE.encode(), **files}))
        run_build(client, context, TAG, base, recipe, _say)
    return TAG


def _say(line: str) -> None:
    print(f"  {line}", file=sys.stderr, flush=True)
