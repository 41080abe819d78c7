"""The host's own troubles: a full disk, a read-only folder, corrupt files. Nothing promised is lost, and errors say where."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from attacked import attacked, events, folder, run, usable

from sandbox_kernel import SessionManager, Settings
from sandbox_kernel.errors import RecordFull, SandboxError
from sandbox_kernel.logfile import Problem, iter_log

pytestmark = pytest.mark.usefixtures("image")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 24 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    root = tmp_path / "disk"
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", root], check=True)
    yield root
    subprocess.run(["mount", "-o", "remount,rw", root], check=True)
    subprocess.run(["umount", "-l", root], check=True)


def fill(root: Path) -> Path:
    path = root / "ballast"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass
    return path


async def test_a_full_disk(small_disk: Path) -> None:
    async with attacked(small_disk) as session:
        await usable(session)
        ballast = fill(small_disk)
        outcomes = []
        for n in range(4):
            try:
                outcomes.append(
                    (
                        await session.execute(f"during = {n}\nopen('artifacts/full.bin', 'wb').write(b'x' * 100_000)")
                    ).status
                )
            except SandboxError as exc:
                assert isinstance(exc, RecordFull) and "no space left" in str(exc) and str(small_disk) in str(exc), exc
                outcomes.append("refused")
        assert "refused" in outcomes
        ballast.unlink()
        await session.execute("!rm -f artifacts/*")
        await session.execute("1")
        await usable(session)
        assert (await run(session, "print(alive)")).strip() == "42", "the kernel lived through it"
    ids = [line["msg_id"] for line in events(session, "code_execution")]
    assert len(ids) == len(set(ids)), "no cell twice"
    assert not [line for line in iter_log(folder(session) / "session.log") if isinstance(line, Problem)]


async def test_a_kernel_that_fills_the_disk(small_disk: Path) -> None:
    """`artifacts/` has no quota of its own: cells are refused by name until the host makes room, then all goes on."""
    async with attacked(small_disk, max_artifact_bytes="4m", max_session_artifacts_bytes="8m") as session:
        refused: list[str] = []
        for n in range(4):
            try:
                await session.execute(f"for n in range(30): open(f'artifacts/{n}-{{n}}', 'wb').write(bytes(10**6))")
            except RecordFull as exc:
                refused.append(str(exc))
        assert refused and all(str(small_disk) in text for text in refused)
        for path in (folder(session) / "artifacts").iterdir():
            path.unlink()
        with contextlib.suppress(RecordFull):  # a line that could not be written then is told now
            await session.execute("1")
        await usable(session)
    ids = [line["msg_id"] for line in events(session, "code_execution")]
    assert len(ids) == len(set(ids)), "no cell twice"


async def test_a_full_store_costs_no_cell_its_line(small_disk: Path, tmp_path: Path) -> None:
    """The log lies elsewhere and has room: what of a cell's output the store cannot keep, its line says."""
    async with attacked(tmp_path, store_root=small_disk / "store", max_output_bytes=20_000) as session:
        await usable(session)
        ballast = fill(small_disk)
        printed = await session.execute("for n in range(200_000): print(f'{n:09d}')")
        assert printed.status == "ok", printed
        assert printed.stdout.startswith("000000000\n") and printed.stdout.endswith("000199999\n")
        shown = await session.execute(
            "import base64, os\ndisplay({'image/png': base64.b64encode(os.urandom(200_000)).decode()}, raw=True)"
        )
        assert shown.status == "ok", shown
        lines = {line["msg_id"]: line for line in events(session, "code_execution")}
        for result in (printed, shown):
            assert "no space left" in lines[result.msg_id]["output_lost"].lower()
        ballast.unlink()
        await usable(session)
    assert "output_lost" not in events(session, "code_execution")[-1]


async def test_a_read_only_folder(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises((SandboxError, OSError)) as caught:
        async with attacked(small_disk):
            pass
    assert "read-only" in str(caught.value).lower() and str(small_disk) in str(caught.value)


async def test_corrupt_metadata_and_a_truncated_database(tmp_path: Path) -> None:
    async with attacked(tmp_path) as session:
        await usable(session)
    root, path = tmp_path / "sessions", folder(session)
    (path / "session_metadata.json").write_text('{"session_id": ')
    database = root / ".store/store.sqlite"
    with database.open("r+b") as file:
        file.truncate(database.stat().st_size // 2)

    def doctor(*options: str) -> tuple[int, list[dict[str, object]]]:
        command = [sys.executable, "-m", "sandbox_kernel.cli", "doctor", "--sessions", "--json", *options]
        done = subprocess.run([*command, "--sessions-root", str(root)], capture_output=True, text=True, timeout=60)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout)["checks"]

    code, findings = doctor()
    assert code != 0 and any("session_metadata.json" in str(finding["where"]) for finding in findings)
    code, findings = doctor("--repair")
    assert code == 0 and all(finding["mended"] for finding in findings), findings
    assert doctor() == (0, [])
    async with SessionManager(Settings(sessions_root=root)) as manager:
        again = await manager.start("victim")
        assert [artifact.path for artifact in await again.artifacts()] == ["alive.txt"]
        (artifact,) = await again.artifacts()
        assert await again.read_artifact(artifact.id) == b"x"
        await usable(again)
    assert len(events(session, "session_started")) == 2


async def test_without_a_repair_the_next_start_mends_it(tmp_path: Path) -> None:
    async with attacked(tmp_path) as session:
        await usable(session)
    for garbage in (b"", b"\x00" * 100, b"[]", b'{"execution_count": "many", "created_at": 7, "container_id": []}'):
        (folder(session) / "session_metadata.json").write_bytes(garbage)
        async with SessionManager(Settings(sessions_root=tmp_path / "sessions")) as manager:
            assert [info.session_id for info in await manager.list()] == ["victim"]
            await usable(await manager.start("victim"))


async def test_a_clock_that_jumped(tmp_path: Path) -> None:
    """Times in the record from a future that was not: nothing waits for them."""
    async with attacked(tmp_path) as session:
        await usable(session)
    path = folder(session) / "session_metadata.json"
    metadata = json.loads(path.read_text())
    path.write_text(
        json.dumps({**metadata, "created_at": "2199-01-01T00:00:00+00:00", "last_used": "2199-01-01T00:00:00+00:00"})
    )
    async with SessionManager(Settings(sessions_root=tmp_path / "sessions", idle_timeout_s=60)) as manager:
        again = await manager.start("victim")
        result = await again.execute("1")
        assert result.success and 0 <= result.duration_s < 10
        assert [info.status for info in await manager.list()] == ["running"]
