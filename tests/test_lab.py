"""JupyterLab and other Jupyter programs on a session that runs: real servers, a real browser, a real kernel."""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import nbformat
import pytest
import pytest_asyncio
from browser import LabPage, chromium, lab_page
from jupyter_client.asynchronous.client import AsyncKernelClient
from jupyter_client.manager import AsyncKernelManager, KernelManager
from kernels import client_of, spec
from nbclient import NotebookClient
from playwright.async_api import Browser, expect
from terminal import console

from sandbox_kernel.errors import ConnectionFileError, KernelStartError, SessionClosed
from sandbox_kernel.lab import LabServer, LabTarget, how_to_attach, write_kernelspec, write_notebook
from sandbox_kernel.provisioning.docker import DockerProvisioner
from sandbox_kernel.provisioning.local import LocalHostProvisioner, NoIsolation

pytestmark = pytest.mark.asyncio(loop_scope="module")

Host = DockerProvisioner | LocalHostProvisioner


class Running:
    """A session's kernel, launched as a session launches it, and a client past Lab: the session's own."""

    def __init__(self, target: LabTarget, host: Host, client: AsyncKernelClient) -> None:
        self.target = target
        self.host = host
        self.client = client

    async def eval(self, expression: str, timeout: float = 20) -> str:
        """The repr of an expression."""
        reply = await self.client.execute(
            "", silent=True, user_expressions={"value": expression}, reply=True, timeout=timeout
        )
        value = reply["content"]["user_expressions"]["value"]
        return str(value["data"]["text/plain"] if value["status"] == "ok" else value["ename"])

    async def run(self, code: str) -> None:
        reply = await self.client.execute(code, reply=True, timeout=20)
        assert reply["content"]["status"] == "ok", reply["content"]


@asynccontextmanager
async def running(folder: Path, session_id: str, **settings: Any) -> AsyncIterator[Running]:
    wanted = spec(folder, session_id, **settings)
    host: Host
    if wanted.settings.engine == "local":
        host = LocalHostProvisioner(kernel_id=wanted.kernel_id, spec=wanted)
        with pytest.warns(NoIsolation):
            info = await host.launch()
    else:
        host = DockerProvisioner(kernel_id=wanted.kernel_id, spec=wanted)
        info = await host.launch()
    try:
        assert host.connection_file is not None
        target = LabTarget(session_id, host.connection_file, folder / "notebooks", str(host.container_id))
        async with client_of(info) as client:
            yield Running(target, host, client)
    finally:
        await host.remove()


async def until(condition: Callable[[], bool | Awaitable[bool]], timeout: float = 20) -> None:
    """Waits for a condition of a process we have no events of."""
    async with asyncio.timeout(timeout):
        while True:
            value = condition()
            if value if isinstance(value, bool) else await value:
                return
            await asyncio.sleep(0.05)


async def fresh(session: Running) -> bool:
    """Whether a restarted kernel answers: one that has run nothing."""
    try:
        return await session.eval("before_restart", timeout=0.5) == "NameError"
    except TimeoutError:  # the request went to the kernel before
        return False


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def session(image: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Running]:
    async with running(tmp_path_factory.mktemp("conv"), "Conv") as kernel:
        yield kernel


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def lab(session: Running) -> AsyncIterator[LabServer]:
    async with LabServer(session.target) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as instance:
        yield instance


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def page(lab: LabServer, browser: Browser) -> AsyncIterator[LabPage]:
    async with lab_page(lab.url, browser) as opened:
        yield opened


# -- JupyterLab in a browser ---------------------------------------------------------------


async def test_lab_and_session_share_variables(session: Running, page: LabPage) -> None:
    await session.run("shared = 41")
    assert await page.run("shared + 1") == "42"
    await page.run("from_lab = [1, 2]")
    assert await session.eval("from_lab") == "[1, 2]"


async def test_a_cell_of_several_lines_is_typed_as_it_is(page: LabPage) -> None:
    assert (
        await page.run('for i in range(2):\n    if i:\n        print("({[", i)\n    print("end")') == "end\n({[ 1\nend"
    )


@pytest.mark.parametrize(
    ("wait", "error"),
    [
        ("import time; time.sleep(60)", "KeyboardInterrupt"),
        ("while True: pass", "KeyboardInterrupt"),
        # An interrupt alone does not wake this one (ipykernel #881).
        ("import asyncio; await asyncio.sleep(60)", "CancelledError|KeyboardInterrupt"),
    ],
)
async def test_stop_ends_a_running_cell(page: LabPage, wait: str, error: str) -> None:
    await page.start(f"print('going')\n{wait}")
    await expect(page.cell.locator(".jp-OutputArea-output").first).to_have_text("going")
    await page.stop()
    assert re.search(error, await page.finished())


async def test_stop_ends_the_cell_of_another_client(session: Running, page: LabPage) -> None:
    reply = asyncio.ensure_future(session.client.execute("import time; time.sleep(60)", reply=True, timeout=20))
    await page.busy()
    await page.stop()
    assert (await reply)["content"]["ename"] == "KeyboardInterrupt"
    await page.idle()


async def test_restart_kernel_restarts_the_sessions_kernel(session: Running, page: LabPage) -> None:
    await session.run("before_restart = 1")
    await page.menu("Kernel", "Restart Kernel…", confirm=True)
    await expect(page.page.locator(".jp-Dialog")).to_have_count(0)
    await until(lambda: fresh(session))
    await page.ready()
    assert "NameError" in await page.run("before_restart")
    assert await session.host.poll() is None
    await session.run("after_restart = 5")
    assert await page.run("after_restart") == "5"


async def test_lab_follows_a_restart_by_the_session(session: Running, page: LabPage) -> None:
    await session.run("before_restart = 1")
    await session.host.restart_in_place()
    await until(lambda: fresh(session))
    assert "NameError" in await page.run("before_restart")


@pytest.mark.parametrize(
    ("menu", "item", "confirm"),
    [
        ("Kernel", "Shut Down Kernel", False),
        ("Kernel", "Shut Down All Kernels…", True),
        ("File", "Close and Shut Down Notebook", True),
    ],
)
async def test_shutting_down_in_lab_detaches(
    session: Running, lab: LabServer, page: LabPage, menu: str, item: str, confirm: bool
) -> None:
    await session.run(f"kept = {item!r}")
    await page.menu(menu, item, confirm=confirm)
    await until(lambda: get(lab, "/api/kernels") == [])
    assert await session.eval("kept") == repr(item)
    # And Lab attaches again.
    await page.page.goto(lab.url)
    await page.ready()
    assert await page.run("kept") == repr(item)


async def test_lab_killed_leaves_the_session_alive(session: Running, browser: Browser) -> None:
    async with LabServer(session.target) as server:
        async with lab_page(server.url, browser) as opened:
            await opened.run("survivor = 'x'")
            os.killpg(server.pid, signal.SIGKILL)
            await server.wait()
    assert await session.eval("survivor") == "'x'"


# -- the server ----------------------------------------------------------------------------


def request(server: LabServer, method: str, path: str, body: object = None) -> object:
    """Lab's REST interface with its token, as a script in one of its pages could use it."""
    base, _, query = server.url.partition("/lab/tree/")
    token = query.partition("token=")[2].partition("&")[0]
    data = None if body is None else json.dumps(body).encode()
    headers = {"Authorization": f"token {token}"}
    with urlopen(Request(base + path, data=data, method=method, headers=headers), timeout=20) as reply:
        return json.loads(reply.read() or b"null")


def get(server: LabServer, path: str) -> object:
    return request(server, "GET", path)


async def test_lab_offers_nothing_of_the_host(lab: LabServer) -> None:
    specs = await asyncio.to_thread(get, lab, "/api/kernelspecs")
    assert isinstance(specs, dict)
    assert list(specs["kernelspecs"]) == [specs["default"]] == ["sandbox-_conv"]
    for method, path, body in [
        ("POST", "/api/kernels", {"name": "python3"}),
        ("POST", "/api/sessions", {"name": "", "path": "x.ipynb", "type": "notebook", "kernel": {"name": "python3"}}),
        ("POST", "/api/terminals", {}),
        ("GET", "/api/contents/..%2fkernel.json", None),
        ("GET", "/lsp/status", None),
        ("POST", "/lab/api/extensions", {"cmd": "install", "extension_name": "ipympl"}),
    ]:
        with pytest.raises(HTTPError):
            print(path, await asyncio.to_thread(request, lab, method, path, body))


async def test_lab_ends_with_its_processes_and_files(session: Running) -> None:
    async with LabServer(session.target) as server:
        home = Path(os.readlink(f"/proc/{server.pid}/fd/1")).parent
        assert home.is_dir()
        assert b"token=" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        await asyncio.to_thread(request, server, "POST", "/api/kernels", {"name": session.target.kernel_name})
        await session.run("kept = 7")
        os.kill(os.getpid(), signal.SIGTERM)
        assert await server.wait() == -signal.SIGTERM
    assert not alive(server.pid)
    assert not home.exists()
    assert await session.eval("kept") == "7"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
async def test_a_signal_ends_lab_and_not_the_session(session: Running, tmp_path: Path, number: signal.Signals) -> None:
    script = f"""
import asyncio, sys
from pathlib import Path
from sandbox_kernel.lab import LabServer, LabTarget
target = LabTarget(
    "Conv",
    Path({str(session.target.connection_file)!r}),
    Path({str(session.target.notebook_dir)!r}),
    {session.target.container_id!r},
)
async def main():
    async with LabServer(target) as lab:
        print(lab.pid, flush=True)
        sys.exit(-await lab.wait())
try:
    asyncio.run(main())
except KeyboardInterrupt:
    sys.exit(130)
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, stdout=asyncio.subprocess.PIPE, env={**os.environ, "TMPDIR": str(tmp_path)}
    )
    assert process.stdout is not None
    pid = int(await process.stdout.readline())
    process.send_signal(number)
    assert await process.wait() == {signal.SIGINT: 130, signal.SIGKILL: -9}[number]
    # A killed parent cannot wait for Lab: then it is the system that ends it.
    await until(lambda: not alive(pid), 0.1 if number != signal.SIGKILL else 10)
    assert await session.eval("1 + 1") == "2"


async def test_a_taken_port_is_named_with_labs_own_words(session: Running, lab: LabServer) -> None:
    with pytest.raises(KernelStartError, match=f"{lab.port}.*in use"):
        async with LabServer(session.target, port=lab.port):
            pass


# -- other Jupyter programs through the kernelspec -----------------------------------------


@pytest.fixture
def offered(session: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The session's kernelspec where every Jupyter program of this process looks; its name."""
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    return write_kernelspec(session.target, tmp_path).name


async def test_nbclient_attaches_and_detaches(session: Running, offered: str) -> None:
    await session.run("shared = 20")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("from_nbclient = shared + 1\nfrom_nbclient")])
    await NotebookClient(notebook, kernel_name=offered).async_execute()
    assert notebook.cells[0].outputs[0]["data"]["text/plain"] == "21"
    assert await session.eval("from_nbclient") == "21"


async def test_a_console_attaches_interrupts_and_detaches(session: Running, offered: str) -> None:
    """By the kernelspec: with --existing jupyter_client gives the console no CurveZMQ keys, and it waits for ever."""
    await session.run("shared = 20")

    with console("--kernel", offered) as terminal:
        terminal.read_until("In [")
        terminal.type("print('begun', shared + 1); import time; time.sleep(60)\r\n")
        terminal.read_until("begun 21")
        terminal.interrupt()
        terminal.read_until("KeyboardInterrupt")
        terminal.type("from_console = 7; print('and', 'on')\r\n")
        terminal.read_until("and on")
        terminal.type("exit\r\n")
        assert terminal.exit_code() == 0
    assert await session.eval("from_console, shared") == "(7, 20)"


@pytest.mark.parametrize("settings", [{"engine": "local"}, {"transport": "tcp"}], ids=["local", "tcp"])
async def test_a_blocking_manager_attaches_restarts_and_detaches(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    def use(kernel_name: str) -> str:
        manager = KernelManager(kernel_name=kernel_name)
        manager.start_kernel()
        assert manager.is_alive()
        manager.restart_kernel()
        client = manager.client()
        client.start_channels()
        try:
            return str(client.execute("blocking = 1", reply=True, timeout=20)["content"]["status"])
        finally:
            client.stop_channels()
            manager.shutdown_kernel()
            asyncio.get_event_loop().close()  # jupyter_core made it for this context, and leaves it to the collector

    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    async with running(tmp_path, "conv", **settings) as kernel:
        await kernel.run("kept = 1")
        name = write_kernelspec(kernel.target, tmp_path).name
        assert await asyncio.to_thread(contextvars.Context().run, use, name) == "ok"
        assert await kernel.eval("kept") == "NameError"
        assert await kernel.eval("blocking") == "1"


async def test_a_dead_kernel_is_seen_and_its_successor_is_the_same_to_lab(
    image: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    async with running(tmp_path, "conv") as kernel:
        name = write_kernelspec(kernel.target, tmp_path).name
        manager = AsyncKernelManager(kernel_name=name)
        await manager.start_kernel()
        first = kernel.host.container_id
        await kernel.host.launch()
        assert kernel.host.container_id != first
        assert await manager.is_alive()
        # The kernelspec still names the first container.
        await manager.restart_kernel()
        await kernel.host.send_signal(signal.SIGKILL)
        await until(lambda: not_alive(manager))
        await manager.shutdown_kernel()
        with pytest.raises(SessionClosed, match="start it again"):
            await AsyncKernelManager(kernel_name=name).start_kernel()


async def not_alive(manager: AsyncKernelManager) -> bool:
    return not await manager.is_alive()


# -- files and texts -----------------------------------------------------------------------


async def test_kernelspec_names_keep_sessions_apart(tmp_path: Path) -> None:
    ids = ["conv", "Conv", "cOnv", "CONV", "conv-1", "_conv", "a.b_C-9"]
    names = [LabTarget(name, tmp_path, tmp_path, "c").kernel_name for name in ids]
    assert len({name.lower() for name in names}) == len(ids)
    assert names[0] == "sandbox-conv"


async def test_the_notebook_is_made_once_and_valid(tmp_path: Path) -> None:
    target = LabTarget("conv", tmp_path / "k.json", tmp_path / "deep" / "folder", "c")
    path = write_notebook(target)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == target.kernel_name
    path.write_text("mine")
    assert write_notebook(target).read_text() == "mine"


async def test_a_missing_or_foreign_connection_file_is_named(tmp_path: Path) -> None:
    target = LabTarget("conv", tmp_path / "k.json", tmp_path, "c")
    with pytest.raises(ConnectionFileError, match=r"k\.json.*start it again"):
        write_kernelspec(target, tmp_path)
    for content in ("{", "[]", "{}", '{"shell_port": 1}'):
        target.connection_file.write_text(content)
        with pytest.raises(ConnectionFileError, match=r"k\.json is not a kernel's connection file"):
            write_kernelspec(target, tmp_path)


async def test_how_to_attach_names_every_way(tmp_path: Path) -> None:
    target = LabTarget("conv", tmp_path / "kernel-conv.json", tmp_path, "c")
    text = how_to_attach(target, url="http://127.0.0.1:1/lab/tree/conv.ipynb?token=t&reset")
    for part in (
        "session conv",
        "http://127.0.0.1:1/?token=t\n",
        "jupyter console --kernel sandbox-conv\n",
    ):
        assert part in text
