"""What the tests stand on: an engine, the image, a browser; and nothing of ours left behind.

Nothing is brought up here (``make test`` does that). Where something is missing the tests that need it are skipped,
but with ``CI`` in the environment they fail: a green run there has run everything.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn

import docker
import pytest

from sandbox_kernel.provisioning.bringup import engine_status
from sandbox_kernel.provisioning.engine import MANAGED
from sandbox_kernel.provisioning.image import TAG, is_current

# A job in the background (nohup, `&` in a script) inherits an ignored Ctrl-C, and hands it on to what the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _missing(what: str, remedy: str) -> NoReturn:
    message = f"{what}. To mend it: {remedy}"
    if os.environ.get("CI"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


@pytest.fixture(scope="session")
def engine() -> Iterator[docker.DockerClient]:
    """docker-py's client of the engine that answers."""
    status = engine_status()
    if not status.answers:
        _missing(status.detail, "make engine")
    with closing(docker.from_env()) as client:
        yield client


@pytest.fixture(scope="session")
def image(engine: docker.DockerClient) -> str:
    """``sandbox:latest``, made from this checkout's recipe."""
    if not is_current(TAG):
        _missing(f"{TAG} is not on the engine, or made from another recipe", "make image")
    return TAG


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of the browser."""
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    if found is None:
        _missing("there is no Chromium on this machine", "make browser")
    return found


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder all ``tmp_path`` of this run lie in; tells our containers from those of another run."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def _watching() -> Iterator[docker.DockerClient | None]:
    if not engine_status().answers:
        yield None
        return
    with closing(docker.from_env()) as client:
        yield client


@pytest.fixture(scope="module", autouse=True)
def no_container_left(_watching: docker.DockerClient | None, run_folder: Path) -> Iterator[None]:
    """Fail the module that leaves a container behind, and remove it for the next one."""
    if _watching is None:
        yield
        return
    before = {entry["Id"] for entry in _managed(_watching)}
    yield
    left = [e for e in _managed(_watching) if e["Id"] not in before and _of_this_run(e, run_folder)]
    for entry in left:
        _watching.api.remove_container(entry["Id"], v=True, force=True)
    if left:
        pytest.fail("left behind: " + "; ".join(f"{e['Names'][0]} ({e['Status']})" for e in left), pytrace=False)


def _managed(client: docker.DockerClient) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = client.api.containers(all=True, filters={"label": MANAGED})
    return [entry for entry in entries if entry["State"] != "removing"]


def _of_this_run(entry: dict[str, Any], run_folder: Path) -> bool:
    """Whether this run made it: other runs may share the engine.

    A container without sessions root (a Jupyter program's) does not tell; in CI there is no other run.
    """
    root = entry["Labels"].get("sandbox-kernel.path")
    return Path(root).is_relative_to(run_folder.resolve()) if root else bool(os.environ.get("CI"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """A test that failed shows what its containers were doing."""
    report: pytest.TestReport = yield
    if report.failed:
        client, folder = (getattr(item, "funcargs", {}).get(name) for name in ("_watching", "run_folder"))
        if client is not None and folder is not None:
            for entry in _managed(client):
                if _of_this_run(entry, folder):
                    try:
                        log = client.api.logs(entry["Id"], tail=30).decode("utf-8", "replace")
                    except docker.errors.APIError as exc:  # it is being removed
                        log = str(exc)
                    report.sections.append((f"container {entry['Names'][0]} ({entry['Status']})", log))
    return report
