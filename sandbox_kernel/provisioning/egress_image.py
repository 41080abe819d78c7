"""The image ``sandbox-egress:latest``: Debian's Squid upon the base of ``sandbox:latest``."""

from __future__ import annotations

import hashlib
import io

from sandbox_kernel.provisioning.engine import tar
from sandbox_kernel.provisioning.image import base_image, engine_client, image_folder, recipe_of, run_build
from sandbox_kernel.provisioning.process import Progress, say

IMAGE = "sandbox-egress:latest"


def egress_recipe(base: str | None = None) -> str:
    """SHA-256 over what the image is made from."""
    return hashlib.sha256((base or "").encode() + _dockerfile()).hexdigest()


def is_egress_current() -> bool:
    """Whether the engine has the image, made from today's recipe. Raises EngineUnavailable."""
    with engine_client() as client:
        return recipe_of(client, IMAGE) == egress_recipe()


def build_egress_image(*, base: str | None = None, force: bool = False, progress: Progress = say) -> str:
    """Build it and return its id. Blocking: about 20 s, nothing when it is current; the build reaches Debian's mirror.

    ``base``: an image with Debian trixie. Raises EngineUnavailable, or EngineError naming the step that failed.
    """
    with engine_client() as client:
        if force or recipe_of(client, IMAGE) != egress_recipe(base):
            chosen = base_image(client, base, str(client.version().get("Arch", "amd64")), progress)
            progress(f"build {IMAGE} upon {chosen}")
            run_build(
                client, io.BytesIO(tar({"Dockerfile": _dockerfile()})), IMAGE, chosen, egress_recipe(base), progress
            )
        progress(f"{IMAGE} is current.")
        return str(client.inspect_image(IMAGE)["Id"])


def _dockerfile() -> bytes:
    return (image_folder() / "egress" / "Dockerfile").read_bytes()
