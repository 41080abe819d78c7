"""The kernelspec by which any Jupyter program starts a container kernel."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jupyter_client.kernelspec import KernelSpecManager

from sandbox_kernel.errors import SettingsError
from sandbox_kernel.provisioning.container import COMMAND
from sandbox_kernel.settings import Settings

NAME = "sandbox"
DISPLAY_NAME = "Python 3 (sandbox)"


def kernel_json(overrides: Mapping[str, Any], display_name: str = DISPLAY_NAME) -> dict[str, Any]:
    """The content of ``kernel.json``. ``overrides``: values of :class:`Settings` other than the default.

    ``argv`` is what runs in the container: a program that knows no provisioners fails on it at once.
    """
    return {
        "argv": list(COMMAND),
        "display_name": display_name,
        "language": "python",
        "interrupt_mode": "message",
        "metadata": {
            "debugger": False,
            "supported_encryption": ["curve"],
            "kernel_provisioner": {"provisioner_name": "sandbox-docker", "config": {"settings": dict(overrides)}},
        },
    }


def install(
    *,
    user: bool = False,
    sys_prefix: bool = False,
    prefix: str | Path | None = None,
    name: str = NAME,
    display_name: str = DISPLAY_NAME,
    **overrides: Any,
) -> Path:
    """Write the kernelspec as ``ipykernel install`` does; the folder it is in.

    At most one of ``user``, ``sys_prefix`` and ``prefix``; without any, the machine's own folder.
    Raises SettingsError for overrides that are wrong or contradict each other, for a name that Jupyter does not take,
    and for a folder that cannot be written.
    """
    if sum((user, sys_prefix, prefix is not None)) > 1:
        raise SettingsError("give at most one of --user, --sys-prefix and --prefix")
    # Whatever is wrong with them should be said now, not when the kernel starts.
    settings = Settings(**overrides)
    if settings.engine == "local":
        raise SettingsError("engine='local' needs no kernelspec of ours: `ipykernel install` writes one")
    stored = {key: settings.model_dump(mode="json")[key] for key in overrides}
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "kernel.json").write_text(json.dumps(kernel_json(stored, display_name), indent=1))
        _add_logos(Path(folder))
        where = sys.prefix if sys_prefix else prefix
        try:
            return Path(
                KernelSpecManager().install_kernel_spec(
                    folder, kernel_name=name, user=user, prefix=None if where is None else str(where)
                )
            )
        except OSError as exc:
            raise SettingsError(
                f"cannot write {exc.filename}: {exc.strerror}; use --user, --sys-prefix or another --prefix"
            ) from exc
        except ValueError as exc:  # a name that Jupyter does not take
            raise SettingsError(str(exc)) from exc


def _add_logos(folder: Path) -> None:
    """ipykernel's pictures, by which a launcher shows that it is Python."""
    import ipykernel

    for picture in Path(ipykernel.__file__).parent.glob("resources/logo-*"):
        shutil.copy(picture, folder)
