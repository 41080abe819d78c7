"""What is stored, to be read: artifacts by id, by session, by path, and the bytes of each."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from pathlib import Path
from typing import BinaryIO, Literal

from sandbox_kernel.artifacts.blobs import BlobFolder
from sandbox_kernel.artifacts.catalog import Catalog
from sandbox_kernel.artifacts.intake import CHUNK
from sandbox_kernel.errors import ArtifactError, ArtifactNotFound
from sandbox_kernel.events import Artifact

Kind = Literal["file", "output", "export"]
Artifacts = list[Artifact]  # in the class, `list` is its method


class StoredArtifacts:
    """The reading side of :class:`~sandbox_kernel.artifacts.store.ArtifactStore`, which opens it."""

    def __init__(self, root: Path, blobs: BlobFolder, catalog: Catalog) -> None:
        self.root = root
        self.blobs = blobs
        self.catalog = catalog

    def get(self, artifact_id: str) -> Artifact:
        """Raises ArtifactNotFound."""
        artifact = self.catalog.get(artifact_id)
        if artifact is None:
            raise ArtifactNotFound(f"no artifact {artifact_id!r} in {self.root}; `sandbox-kernel artifacts` lists them")
        return artifact

    def list(
        self,
        session_id: str | None = None,
        *,
        path: str | None = None,
        kind: Kind | None = None,
        msg_id: str | None = None,
    ) -> Artifacts:
        """The artifacts that match, oldest first."""
        where = {"session_id": session_id, "path": path, "kind": kind, "msg_id": msg_id}
        return self.catalog.list({name: value for name, value in where.items() if value is not None})

    def open_artifact(self, artifact_id: str) -> BinaryIO:
        """The bytes of an artifact as a stream. Raises ArtifactNotFound; ArtifactError when its blob is missing."""
        artifact = self.get(artifact_id)
        return self._open_blob(artifact.sha256, f"artifact {artifact_id} ({artifact.path})")

    def read(self, artifact_id: str) -> bytes:
        """All bytes of an artifact. Raises as :meth:`open_artifact`."""
        with self.open_artifact(artifact_id) as file:
            return file.read()

    def save(self, artifact_id: str, path: Path | str) -> Path:
        """Copy an artifact to ``path`` (into it, under its own name, when that is a folder), at once or not at all.

        Raises as :meth:`open_artifact`, and ArtifactError when ``path`` cannot be written. Gives the file's path.
        """
        artifact = self.get(artifact_id)
        target = Path(path)
        if target.is_dir():
            target = target / artifact.filename
        temporary = target.with_name(f".{secrets.token_hex(8)}.part")
        try:
            with self.open_artifact(artifact_id) as source, temporary.open("xb") as file:
                shutil.copyfileobj(source, file, CHUNK)
            temporary.replace(target)
        except OSError as exc:
            raise ArtifactError(f"artifact {artifact_id} cannot be saved as {target}: {exc.strerror}") from exc
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        return target

    def read_blob(self, sha256: str) -> bytes:
        """The bytes of a picture (or any blob). Raises ArtifactNotFound, ArtifactError."""
        if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
            raise ArtifactNotFound(f"{sha256!r} is not a SHA-256 in hex")
        with self._open_blob(sha256, "it") as file:
            return file.read()

    def _open_blob(self, sha256: str, what: str) -> BinaryIO:
        try:
            return self.blobs.path(sha256).open("rb")
        except FileNotFoundError:
            raise ArtifactNotFound(
                f"the bytes of {what} are missing: no blob {sha256} in {self.root}; "
                "run `sandbox-kernel doctor --sessions`"
            ) from None
