"""The image ``sandbox:latest``: what it is made from, whether it is there, and how it is built.

Three steps, each told as it goes: a base (``python:3.13-slim``, or where no registry answers a Debian made on the
spot with ``mmdebstrap``), the locked wheels (fetched here with pip: inside a build pip need not reach, or trust, the
registry), and the build. The image carries the hash of its recipe, so that an unchanged one costs nothing.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import os
import shutil
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import IO, Any

import docker
import requests

from sandbox_kernel.errors import EngineError
from sandbox_kernel.provisioning.engine import translated
from sandbox_kernel.provisioning.process import Progress, run, say

TAG = "sandbox:latest"
BASE = "python:3.13-slim"
DEBIAN_BASE = "sandbox-base:trixie"
PYTHON = "3.13"
RECIPE_LABEL = "sandbox-kernel.recipe"
RECIPE = ("Dockerfile", "requirements.lock", "font_cache.py")

_PULL_SILENCE_S = 20.0
"""A registry that says nothing for so long is taken for absent."""
_BUILD_SILENCE_S = 900.0
_DEBIAN = ("mmdebstrap", "--variant=minbase", "--include=python3,python3-venv,ca-certificates")
_GLIBC = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_24", "manylinux_2_17", "manylinux2014")
_MACHINES = {"amd64": "x86_64", "arm64": "aarch64"}


def image_folder() -> Path:
    """The folder with the Dockerfile: ``images/`` of a checkout, or its copy in the installed package."""
    checkout = Path(__file__).parents[2] / "images"
    if (checkout / "Dockerfile").is_file():
        return checkout
    packaged = Path(str(importlib.resources.files("sandbox_kernel"))) / "_image"
    if (packaged / "Dockerfile").is_file():
        return packaged
    raise EngineError(f"no Dockerfile in {checkout} or {packaged}: install sandbox-kernel again")


def recipe_hash(base: str | None = None) -> str:
    """SHA-256 over everything the image is made from; a base the caller chose is part of it."""
    digest = hashlib.sha256((base or "").encode())
    for name in RECIPE:
        content = (image_folder() / name).read_bytes()
        digest.update(b"%s %d\n" % (name.encode(), len(content)) + content)
    return digest.hexdigest()


def is_current(tag: str = TAG, *, base: str | None = None) -> bool:
    """Whether the engine has ``tag``, made from today's recipe. Raises EngineUnavailable."""
    with engine_client() as client:
        return recipe_of(client, tag) == recipe_hash(base)


def build_image(tag: str = TAG, *, base: str | None = None, force: bool = False, progress: Progress = say) -> str:
    """Build the data-analysis image and return its id. Blocking: about 90 s the first time, nothing when it is current.

    ``base`` is an image with Python 3.13 to build upon (pulled when it is not there); ``force`` builds a current
    image again. ``progress`` is called with one line of text at a time.
    Raises EngineUnavailable, or EngineError naming the step that failed and its last lines.
    """
    with engine_client() as client, ExitStack() as stack:
        recipe = recipe_hash(base)
        if not force and recipe_of(client, tag) == recipe:
            progress(f"{tag} is current.")
            return str(client.inspect_image(tag)["Id"])
        began = time.monotonic()
        architecture = str(client.version().get("Arch", "amd64"))
        progress("[1/3] base image")
        chosen = base_image(client, base, architecture, progress)
        progress(f"[2/3] wheels for Python {PYTHON} on {architecture}")
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sandbox-wheels-")))
        _download_locked(folder, architecture, progress)
        progress(f"[3/3] build {tag} upon {chosen}")
        context = stack.enter_context(tempfile.TemporaryFile())
        _pack(context, sorted(folder.iterdir()))
        run_build(client, context, tag, chosen, recipe, progress)
        identity = str(client.inspect_image(tag)["Id"])
        progress(f"{tag} is ready after {time.monotonic() - began:.0f} s ({identity[7:19]}).")
        return identity


# --- base -------------------------------------------------------------------------------------


def base_image(client: docker.APIClient, base: str | None, architecture: str, progress: Progress) -> str:
    """The base to build upon, on the engine when this returns: ``base``, else one with Debian trixie."""
    wanted = base or BASE
    if _present(client, wanted):
        progress(f"  {wanted} is there")
        return wanted
    if base is None and _present(client, DEBIAN_BASE):
        progress(f"  {DEBIAN_BASE} is there")
        return DEBIAN_BASE
    refusal = _pull(wanted, progress)
    if refusal is None:
        return wanted
    if base is not None:
        raise EngineError(f"the base image {base!r} is not on the engine and cannot be pulled: {refusal}")
    progress(f"  {wanted} cannot be pulled ({refusal}); making {DEBIAN_BASE} here instead")
    _make_debian(client, architecture, progress)
    return DEBIAN_BASE


def _pull(name: str, progress: Progress) -> str | None:
    """Pull ``name``; the reason when that fails."""
    repository, _, tag = name.rpartition(":") if ":" in name.rpartition("/")[2] else (name, "", "latest")
    progress(f"  pulling {name}")
    try:
        with closing(docker.from_env(timeout=_PULL_SILENCE_S)) as client:
            for event in client.api.pull(repository, tag=tag, stream=True, decode=True):
                if "error" in event:
                    return str(event["error"])
                if str(event.get("status", "")).endswith(("complete", "exists")):
                    progress(f"  {event.get('id', '')} {event['status']}")
    except (docker.errors.DockerException, requests.RequestException, OSError) as exc:
        return str(exc)
    return None


def _make_debian(client: docker.APIClient, architecture: str, progress: Progress) -> None:
    """A bare Debian trixie with Python 3.13, from Debian's package mirror; about 20 s."""
    if shutil.which(_DEBIAN[0]) is None:
        raise EngineError(
            f"no registry has {BASE}, and {_DEBIAN[0]}, which makes a base here, is missing: "
            "apt-get install mmdebstrap (or name a base that is there: sandbox-kernel image build --base IMAGE)"
        )
    with tempfile.TemporaryDirectory(prefix="sandbox-base-") as folder:
        archive = Path(folder) / "root.tar"
        mode = [] if os.geteuid() == 0 else ["--mode=unshare"]
        run([*_DEBIAN, f"--architectures={architecture}", *mode, "trixie", str(archive)], progress)
        changes = ["ENV LANG=C.UTF-8", 'CMD ["python3"]']
        with translated("import the Debian base"):
            client.import_image(str(archive), *DEBIAN_BASE.split(":"), changes=changes)
    if not _present(client, DEBIAN_BASE):
        raise EngineError(f"the engine took the Debian base, but has no image {DEBIAN_BASE}")


# --- wheels -----------------------------------------------------------------------------------


def download_wheels(folder: Path, architecture: str, wanted: list[str], progress: Progress) -> None:
    """``pip download`` of ``wanted`` (its arguments): wheels that the image's Python can take. Raises EngineError."""
    machine = _MACHINES.get(architecture, architecture)
    platforms = [argument for glibc in _GLIBC for argument in ("--platform", f"{glibc}_{machine}")]
    command = [
        *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--progress-bar=off"),
        *("--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp", *platforms),
        *("--dest", str(folder), *wanted),
    ]

    def fetching(line: str) -> None:
        if line.lstrip().startswith(("Downloading ", "Using cached ")):
            progress(line)

    run(command, fetching)


def _download_locked(folder: Path, architecture: str, progress: Progress) -> None:
    """Fetch the locked wheels; where that fails the build's own pip must reach the registry."""
    locked = ["--no-deps", "--require-hashes", "--requirement", str(image_folder() / "requirements.lock")]
    try:
        download_wheels(folder, architecture, locked, progress)
    except EngineError as exc:
        progress(f"  not fetched here, so the build must reach the registry itself. {exc}")
        for partial in folder.iterdir():
            partial.unlink()
        return
    sizes = [wheel.stat().st_size for wheel in folder.iterdir()]
    progress(f"  {len(sizes)} wheels, {sum(sizes) / 2**20:.0f} MB")


# --- build ------------------------------------------------------------------------------------


def _pack(context: IO[bytes], wheels: list[Path]) -> None:
    """Write the build context: the recipe and the wheels, with times and owners left out (they spoil the cache)."""
    with tarfile.open(fileobj=context, mode="w") as archive:
        for path, name in [(image_folder() / n, n) for n in RECIPE] + [(w, f"wheels/{w.name}") for w in wheels]:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = path.stat().st_size, 0o644
            with path.open("rb") as content:
                archive.addfile(entry, content)
    context.seek(0)


def run_build(
    client: docker.APIClient, context: IO[bytes], tag: str, base: str, recipe: str, progress: Progress
) -> None:
    """Build with the engine's classic builder: it is in every engine, and needs no buildx."""
    tail: list[str] = []
    with translated(f"build {tag}"):
        stream = client.build(
            fileobj=context,
            custom_context=True,
            tag=tag,
            buildargs={"BASE": base},
            labels={RECIPE_LABEL: recipe},
            rm=True,
            forcerm=True,
            decode=True,
        )
        for event in stream:
            for line in io.StringIO(str(event.get("stream", ""))):
                if line.strip():
                    tail = [*tail[-11:], line.rstrip()]
                    progress(f"  {line.rstrip()[:160]}")
            if "error" in event:
                raise EngineError(f"build of {tag} upon {base} failed: {event['error']}\n" + "\n".join(tail))


# --- engine and processes ---------------------------------------------------------------------


@contextmanager
def engine_client() -> Iterator[docker.APIClient]:
    """A client for builds, which may be silent for long. Raises EngineUnavailable."""
    with translated("reach the container engine"):
        client = docker.from_env(version="auto", timeout=_BUILD_SILENCE_S)
    with closing(client):
        yield client.api


def _present(client: docker.APIClient, name: str) -> bool:
    return _inspect(client, name) is not None


def recipe_of(client: docker.APIClient, name: str) -> str | None:
    """Hash of the recipe that ``name`` was built from; None where it is not there or not ours."""
    labels = ((_inspect(client, name) or {}).get("Config") or {}).get("Labels") or {}
    return labels.get(RECIPE_LABEL)


def _inspect(client: docker.APIClient, name: str) -> dict[str, Any] | None:
    with translated(f"look for the image {name!r}"):
        try:
            found: dict[str, Any] = client.inspect_image(name)
        except docker.errors.ImageNotFound:
            return None
        return found
