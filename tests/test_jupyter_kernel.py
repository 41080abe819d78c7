"""The container kernel as any Jupyter program starts it: by name, from the installed kernelspec."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import jupyter_kernel_test
import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager, KernelManager
from kernels import client_of, evaluate
from nbformat.v4 import new_code_cell, new_notebook
from terminal import console

from sandbox_kernel.errors import SettingsError
from sandbox_kernel.provisioning.engine import MANAGED
from sandbox_kernel.provisioning.kernelspec import install
from sandbox_kernel.provisioning.runtime import runtime_base

WHERE = """
import os
print("in a container:", os.getcwd() == "/session" and not os.path.exists("/work"), os.getuid())
"""


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory, engine: docker.DockerClient, image: str) -> Iterator[Path]:
    """The kernelspec in a prefix of its own; checks afterwards that every runtime directory is gone."""
    prefix = tmp_path_factory.mktemp("prefix")
    folder = install(prefix=prefix, memory_limit="512m")
    assert folder == prefix / "share" / "jupyter" / "kernels" / "sandbox"
    before = set(runtime_base().iterdir())
    patch = pytest.MonkeyPatch()
    patch.setenv("JUPYTER_PATH", str(prefix / "share" / "jupyter"))
    patch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path_factory.mktemp("runtime")))
    yield folder
    patch.undo()
    # Other programs may be starting kernels just now: their folders have, or will have, a container.
    left = set(runtime_base().iterdir()) - before
    deadline = time.monotonic() + 10
    while left and time.monotonic() < deadline:
        found = engine.containers.list(all=True, filters={"label": MANAGED})
        kernels = {container.labels["sandbox-kernel.kernel"] for container in found}
        left = {path for path in left if path.exists() and path.name not in kernels and path.name != "locks"}
    assert left == set()


def containers(engine: docker.DockerClient) -> set[str]:
    """Containers of Jupyter programs, which have an owner."""
    return {found.id for found in engine.containers.list(all=True, filters={"label": "sandbox-kernel.owner"})}


@pytest.fixture(autouse=True)
def none_left(engine: docker.DockerClient) -> Iterator[None]:
    before = containers(engine)
    yield
    assert containers(engine) <= before


async def test_of_the_environment_only_what_the_kernelspec_names_reaches_the_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WHO", "me")
    manager = AsyncKernelManager(kernel_name="sandbox")
    assert manager.kernel_spec is not None
    manager.kernel_spec.env = {"GREETING": "hello ${WHO}"}
    await manager.start_kernel(env={**os.environ, "SECRET_OF_THE_HOST": "1"})
    try:
        async with client_of(manager.get_connection_info()) as client:
            code = (
                "import os; print(os.environ['GREETING'], os.environ.get('SECRET_OF_THE_HOST'), os.environ.get('WHO'))"
            )
            assert await evaluate(client, code) == "hello me None None\n"
    finally:
        await manager.shutdown_kernel(now=True)


def test_the_kernelspec(installed: Path) -> None:
    spec = KernelSpec.from_resource_dir(str(installed))
    assert spec.interrupt_mode == "message"
    assert spec.metadata["supported_encryption"] == ["curve"]
    stanza = spec.metadata["kernel_provisioner"]
    assert stanza == {"provisioner_name": "sandbox-docker", "config": {"settings": {"memory_limit": 2**29}}}
    assert (installed / "logo-64x64.png").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"user": True, "sys_prefix": True}, "at most one"),
        ({"memory_limit": "lots"}, "memory_limit"),
        ({"colour": 1}, "colour"),
    ],
)
def test_wrong_arguments_of_install_are_named(arguments: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=says):
        install(**{"prefix": tmp_path, **arguments})
    assert list(tmp_path.iterdir()) == []


class TestKernel(jupyter_kernel_test.KernelTests):
    """jupyter_kernel_test's own suite. History is off in our kernels (the record is theirs), so are its operations."""

    kernel_name = "sandbox"
    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('test', file=sys.stderr)"
    completion_samples = [  # noqa: RUF012 — the suite's own attributes
        {"text": "zi", "matches": {"zip"}},
        {"text": "sor", "matches": {"sorted"}},
    ]
    complete_code_samples = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n\n"]  # noqa: RUF012
    incomplete_code_samples = ["print('''hello", "def f(x):\n  x*2"]  # noqa: RUF012
    invalid_code_samples = ["import = 7q"]  # noqa: RUF012
    code_page_something = "zip?"
    code_generate_error = "raise ValueError('no')"
    code_execute_result = [  # noqa: RUF012
        {"code": "6*7", "result": "42"},
        {"code": "'a' * 3", "result": "'aaa'"},
    ]
    code_display_data = [  # noqa: RUF012
        {"code": "from IPython.display import HTML, display; display(HTML('<b>test</b>'))", "mime": "text/html"},
        {"code": "import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()", "mime": "image/png"},
    ]
    code_clear_output = "from IPython.display import clear_output; clear_output()"
    code_inspect_sample = "zip"


def notebook(path: Path, *cells: str, tags: tuple[str, ...] = ()) -> Path:
    made = new_notebook(cells=[new_code_cell(cell) for cell in cells])
    made.metadata["kernelspec"] = {"name": "sandbox", "display_name": "sandbox", "language": "python"}
    if tags:
        made.cells[0].metadata["tags"] = list(tags)
    nbformat.write(made, path)
    return path


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stderr
    return done


def printed(path: Path) -> str:
    outputs = [output for cell in nbformat.read(path, 4).cells for output in cell.outputs]
    return "".join(output["text"] for output in outputs if output.output_type == "stream")


def test_jupyter_execute(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", WHERE, "x = 41", "print(x + 1)")
    run("jupyter", "execute", "--inplace", path)
    assert printed(path) == f"in a container: True {1000 if os.geteuid() == 0 else os.geteuid()}\n42\n"


def test_papermill_with_parameters(tmp_path: Path) -> None:
    path = notebook(tmp_path / "n.ipynb", "rows = 1", WHERE, "print(rows * 2)", tags=("parameters",))
    run("papermill", path, tmp_path / "out.ipynb", "-p", "rows", "21", "--log-level", "WARNING")
    assert "in a container: True" in printed(tmp_path / "out.ipynb")
    assert printed(tmp_path / "out.ipynb").endswith("42\n")


def test_jupyter_console(tmp_path: Path) -> None:
    """In a terminal of its own; `exit` ends it, and the container with it."""
    with console("--kernel", "sandbox") as terminal:
        terminal.read_until("In [1]:")
        terminal.type("import os; print(6 * 7, os.getcwd())\r\n")
        terminal.read_until("42 /session")
        terminal.type("exit\r\n")
        assert terminal.exit_code() == 0


async def test_a_restart_keeps_the_connection(installed: Path, engine: docker.DockerClient) -> None:
    for transport in ("ipc", "tcp"):
        manager = AsyncKernelManager(kernel_name="sandbox")
        assert manager.kernel_spec is not None
        manager.kernel_spec.metadata["kernel_provisioner"]["config"]["settings"] = {"transport": transport}
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=30)
        assert (client.transport, client.curve_publickey is not None) == (transport, True)
        before, kernel = manager.get_connection_info(), manager.provisioner.container_id
        await manager.restart_kernel()
        await client.wait_for_ready(timeout=30)
        assert manager.get_connection_info() == before
        assert manager.provisioner.container_id != kernel
        reply = await client.execute_interactive("1", timeout=20)
        assert reply["content"]["status"] == "ok"
        await manager.interrupt_kernel()
        assert await manager.is_alive()
        await manager.shutdown_kernel()
        assert not await manager.is_alive()
        client.stop_channels()
        client.context.destroy(linger=0)


def test_containers_of_a_killed_program_are_swept(engine: docker.DockerClient) -> None:
    code = """
import os
from jupyter_client.manager import KernelManager
manager = KernelManager(kernel_name="sandbox")
manager.start_kernel()
print(manager.provisioner.container_id, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    left = done.stdout.strip()
    assert engine.api.inspect_container(left)["State"]["Running"]
    manager = KernelManager(kernel_name="sandbox")
    manager.start_kernel()
    deadline = time.monotonic() + 20
    while left in containers(engine) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left not in containers(engine)
    manager.shutdown_kernel(now=True)
