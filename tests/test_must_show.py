"""What issue 2 asks to be shown of real sessions: the document's files, Lab in the record, storage × data sets."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
import pytest
from browser import lab_page

from sandbox_kernel import DatasetAccess, SessionManager, SessionStorage, Settings
from sandbox_kernel.lab import LabServer, LabTarget
from sandbox_kernel.logfile import read_log

pytestmark = pytest.mark.usefixtures("image")

DOCUMENT = Path(__file__).parent / "data" / "bind-mode-session-logging.md"


def document_examples() -> tuple[dict[str, dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """The document's own examples: log lines by event, metadata, state."""
    log, metadata, state = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[:3]
    lines = [json.loads(line) for line in log.splitlines()]
    return {line["event"]: line for line in lines}, json.loads(metadata), json.loads(state)


def same_type(example: Any, value: Any) -> bool:
    return type(value) is type(example)


async def test_a_sessions_files_against_the_documents_examples(tmp_path: Path) -> None:
    wanted_log, wanted_metadata, wanted_state = document_examples()
    # tcp, as in the document: over ipc there is no host_port to publish.
    async with SessionManager(Settings(sessions_root=tmp_path, transport="tcp")) as manager:
        session = await manager.start("conv")
        await session.execute(wanted_log["code_execution"]["code"])
        await session.execute(
            "import pandas as pd, numpy, matplotlib.pyplot as plt\n"
            "df = pd.DataFrame({'A': [1, 4], 'B': [2, 5], 'C': [3, 6]})\n"
            "x = [1, 2, 3, 4, 5]\n"
            "plt.plot(x); plt.savefig('artifacts/plot.png'); plt.close()"
        )
        state = await session.state()
        folder = session.directory
        assert folder is not None
    log = read_log(folder / "session.log")
    assert log.problems == []
    for event, example in wanted_log.items():
        line = next(line for line in log.entries if line["event"] == event)
        assert list(line)[: len(example)] == list(example), event
        assert all(same_type(value, line[name]) for name, value in example.items()), event
    first = next(line for line in log.entries if line["event"] == "code_execution")
    assert {name: first[name] for name in ("code", "success", "stdout")} == {
        name: wanted_log["code_execution"][name] for name in ("code", "success", "stdout")
    }
    (created,) = [line for line in log.entries if line["event"] == "artifacts_created"]
    example_artifact = wanted_log["artifacts_created"]["artifacts"][0]
    assert list(created["artifacts"][0])[:3] == list(example_artifact)
    assert created["artifacts"][0]["filename"] == "plot.png"
    assert list((folder / "artifacts").iterdir()) == []

    metadata = json.loads((folder / "session_metadata.json").read_text())
    assert list(metadata)[: len(wanted_metadata)] == list(wanted_metadata)
    assert all(same_type(value, metadata[name]) for name, value in wanted_metadata.items())
    for name in ("session_id", "session_storage", "image"):
        assert metadata[name] == wanted_metadata[name]
    assert metadata["execution_count"] == metadata["final_execution_count"] == 2
    assert datetime.fromisoformat(metadata["stopped_at"]).utcoffset() is not None

    written = json.loads((folder / "python_state.json").read_text())
    assert list(written)[:3] == list(wanted_state)
    assert written["variables"]["df"]["type"] == wanted_state["variables"]["df"]["type"]
    assert written["variables"]["df"]["value"] == wanted_state["variables"]["df"]["value"]
    assert written["variables"]["x"] | wanted_state["variables"]["x"] == written["variables"]["x"]
    assert written["imported_modules"] == wanted_state["imported_modules"]
    assert set(written["variables"]) == {"df", "x"} == set(state.variables)


async def test_logged_outputs_are_nbformat(tmp_path: Path) -> None:
    async with SessionManager(Settings(sessions_root=tmp_path)) as manager:
        session = await manager.start("nb")
        for code in ("print('a')\n1", "1/0", "import matplotlib.pyplot as plt\nplt.plot([1]);\nplt.show()"):
            await session.execute(code)
    cells = [line for line in read_log(tmp_path / "nb/session.log").entries if line["event"] == "code_execution"]
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(
                line["code"], outputs=[nbformat.from_dict(o) for o in line["outputs"]], execution_count=1
            )
            for line in cells
        ]
    )
    nbformat.validate(notebook)
    assert "image/png" not in json.dumps(cells[-1]["outputs"][-1]["data"].get("image/png", ""))


async def test_jupyterlab_stands_in_the_record_with_its_own_origin(tmp_path: Path, chromium: str) -> None:
    async with SessionManager(Settings(sessions_root=tmp_path / "s")) as manager:
        session = await manager.start("conv")
        await session.execute("ours = 'set by the program'")
        assert session.container_id is not None
        target = LabTarget("conv", session.connection_file, tmp_path / "notebooks", session.container_id)
        async with LabServer(target) as lab, lab_page(lab.url) as page:
            assert "set by the program" in await page.run("ours")
            await page.run("theirs = 'set in Lab'")
            await page.start("import time; time.sleep(60)")
            await page.stop()
            assert "KeyboardInterrupt" in await page.finished()
        assert (await session.execute("theirs")).result == "'set in Lab'"
    cells = [line for line in read_log(tmp_path / "s/conv/session.log").entries if line["event"] == "code_execution"]
    told = [(line["code"], line["origin"].split(":")[0], line["status"]) for line in cells]
    assert told == [
        ("ours = 'set by the program'", "sandbox-kernel", "ok"),
        ("ours", "jupyterlab", "ok"),
        ("theirs = 'set in Lab'", "jupyterlab", "ok"),
        ("import time; time.sleep(60)", "jupyterlab", "interrupted"),
        ("theirs", "sandbox-kernel", "ok"),
    ]


@pytest.mark.parametrize("storage", list(SessionStorage))
@pytest.mark.parametrize("access", list(DatasetAccess))
async def test_every_storage_with_every_way_to_data(
    tmp_path: Path, storage: SessionStorage, access: DatasetAccess
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "local.csv").write_text("a,b\n1,2\n")
    fetched: list[str] = []

    async def fetch(dataset_id: str) -> AsyncIterator[bytes]:
        fetched.append(dataset_id)
        await asyncio.sleep(0)
        if dataset_id == "broken.csv":
            raise OSError("the server said no")
        for number in range(3):
            yield b"%d\n" % number

    local = access in (DatasetAccess.LOCAL_RO, DatasetAccess.HYBRID)
    api = access in (DatasetAccess.API, DatasetAccess.HYBRID)
    settings = Settings(
        sessions_root=tmp_path / "s",
        session_storage=storage,
        dataset_access=access,
        datasets_path=data if local else None,
    )
    async with SessionManager(settings, fetch_dataset=fetch if api else None) as manager:
        session = await manager.start("modes")
        made = await session.execute("open('artifacts/m.txt', 'w').write('made')")
        assert [artifact.path for artifact in made.artifacts] == ["m.txt"]
        if local:
            assert (await session.execute("open('/data/local.csv').read()")).result == "'a,b\\n1,2\\n'"
            assert (await session.execute("open('/data/local.csv', 'w')")).status == "error"
        if api:
            chosen = await session.select_dataset("numbers.csv")
            assert (chosen.status, chosen.path) == ("LOADED", "/data/numbers.csv")
            assert (await session.execute("open('/data/numbers.csv').read()")).result == "'0\\n1\\n2\\n'"
            await session.select_dataset("numbers.csv")
            assert fetched == ["numbers.csv"], "the second time it comes from the cache"
            broken = await session.select_dataset("broken.csv")
            assert broken.status == "FAILED"
            assert "the server said no" in (broken.error or "")
        if access is DatasetAccess.NONE:
            assert await session.datasets() == []
        listed = {dataset.id: dataset.status for dataset in await session.datasets()}
        assert listed == ({"local.csv": "LOADED"} if local else {}) | (
            {"numbers.csv": "LOADED", "broken.csv": "FAILED"} if api else {}
        )
    if storage is SessionStorage.TMPFS:
        assert [entry.name for entry in (tmp_path / "s").iterdir()] == [".store"]
