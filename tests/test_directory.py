"""The session directory, its lock, and the opening of hostile files."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox_kernel.directory import (
    Found,
    Refusal,
    SessionDirectory,
    SessionLock,
    check_session_id,
    open_untrusted,
    read_untrusted,
    replace_file,
    scan_untrusted,
)
from sandbox_kernel.errors import ArtifactError, ArtifactRefused, InvalidSessionId, SessionHeld, UntrustedPath
from sandbox_kernel.tree import remove_tree
from sandbox_kernel.untrusted import (
    FOLDER,
    Below,
    file_identity,
    is_text,
)

SECRET = b"of the host"


@pytest.fixture
def jail(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A hostile folder and its descriptor; beside it, a secret."""
    (tmp_path / "secret").write_bytes(SECRET)
    folder = tmp_path / "jail"
    folder.mkdir()
    fd = os.open(folder, FOLDER)
    yield folder, fd
    os.close(fd)


# --- ids and layout ---------------------------------------------------------------------------


@pytest.mark.parametrize("session_id", ["a", "conv", "A-1_b.c", "x" * 64, "0"])
def test_good_ids(session_id: str) -> None:
    assert check_session_id(session_id) == session_id


@pytest.mark.parametrize(
    "session_id", ["", ".", "..", ".store", "a/b", "../a", "a b", "x" * 65, "x" * 300, "é", "a\n", "-a", "a\0", None, 3]
)
def test_bad_ids_are_refused_with_the_rule(session_id: object) -> None:
    with pytest.raises(InvalidSessionId, match=r"A-Za-z0-9"):
        SessionDirectory("sessions", session_id)  # type: ignore[arg-type]


def test_the_layout_is_made_and_made_again(tmp_path: Path) -> None:
    directory = SessionDirectory(tmp_path / "sessions", "conv")
    for _ in range(2):
        directory.create(1000, 1000)
        for folder in (directory.artifacts, directory.state_dir):
            status = folder.lstat()
            assert stat.S_IMODE(status.st_mode) == 0o700
            assert status.st_uid == (1000 if os.geteuid() == 0 else os.geteuid())
        assert os.readlink(directory.state_link) == "state/python_state.json"
        (directory.state_dir / "python_state.json").write_text("{}")
    assert directory.state_link.read_text() == "{}"
    assert directory.path.stat().st_uid == os.geteuid()


def test_a_plain_state_file_of_another_program_is_kept(tmp_path: Path) -> None:
    directory = SessionDirectory(tmp_path, "conv")
    directory.path.mkdir()
    directory.state_link.write_text('{"variables": {}}')
    directory.create(1000, 1000)
    assert directory.state_link.is_symlink()
    assert directory.state_link.read_text() == '{"variables": {}}'


@pytest.mark.parametrize("what", ["conv", "conv/artifacts", "conv/state"])
@pytest.mark.parametrize("how", ["link", "file"])
def test_a_layout_with_a_link_or_a_file_in_it_is_refused(tmp_path: Path, what: str, how: str) -> None:
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o755)
    path = tmp_path / "sessions" / what
    path.parent.mkdir(parents=True)
    if how == "link":
        path.symlink_to(outside)
    else:
        path.write_text("")
    with pytest.raises(UntrustedPath, match="link or no folder"):
        SessionDirectory(tmp_path / "sessions", "conv").create(1000, 1000)
    assert outside.stat().st_uid == os.geteuid()
    assert list(outside.iterdir()) == []


def test_replace_file(tmp_path: Path) -> None:
    for fsync in (False, True):
        replace_file(tmp_path / "f", str(fsync).encode(), fsync=fsync)
        assert (tmp_path / "f").read_text() == str(fsync)
    with pytest.raises(FileNotFoundError):
        replace_file(tmp_path / "nowhere" / "f", b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        replace_file(tmp_path / "folder", b"")
    assert sorted(os.listdir(tmp_path)) == ["f", "folder"]


# --- the lock ---------------------------------------------------------------------------------


def test_the_lock_names_its_holder_and_dies_with_it(tmp_path: Path) -> None:
    path = tmp_path / "conv" / ".lock"
    path.parent.mkdir()
    assert SessionLock.holder(path) is None
    code = (
        "import sys; from pathlib import Path; from sandbox_kernel.directory import SessionLock\n"
        "lock = SessionLock(Path(sys.argv[1])); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert SessionLock.holder(path) == holder.pid
        with pytest.raises(SessionHeld, match=rf"'conv'.*{holder.pid}"):
            SessionLock(path).acquire()
        holder.send_signal(signal.SIGKILL)
    assert SessionLock.holder(path) is None
    with SessionLock(path) as lock:
        assert lock.held
        with pytest.raises(SessionHeld):
            SessionLock(path).acquire()
    assert SessionLock.holder(path) is None


def test_children_do_not_inherit_the_lock(tmp_path: Path) -> None:
    lock = SessionLock(tmp_path / ".lock")
    lock.acquire()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.read(read, 1)
        os._exit(0)
    with subprocess.Popen(["sleep", "60"]) as other:
        try:
            os.close(lock._fd)  # type: ignore[arg-type]  # as if the holder died
            lock._fd = None
            deadline = time.monotonic() + 10
            while SessionLock.holder(tmp_path / ".lock") is not None:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            other.kill()
            os.write(write, b"x")
            os.waitpid(child, 0)
            os.close(read)
            os.close(write)


def test_a_lock_that_is_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UntrustedPath):
        SessionLock(tmp_path / ".lock").acquire()
    assert not (tmp_path / "elsewhere").exists()


# --- hostile files ----------------------------------------------------------------------------


def test_a_regular_file_is_read(jail: tuple[Path, int]) -> None:
    folder, fd = jail
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "b" / "f").write_bytes(b"content")
    assert read_untrusted(fd, "a/b/f", max_bytes=7) == b"content"
    with pytest.raises(ArtifactRefused, match="7 bytes; at most 6"):
        read_untrusted(fd, b"a/b/f", max_bytes=6)
    with pytest.raises(FileNotFoundError):
        read_untrusted(fd, "a/c/f", max_bytes=7)


def _link(folder: Path) -> None:
    (folder / "x").symlink_to("../secret")


def _dangling(folder: Path) -> None:
    (folder / "x").symlink_to("nowhere")


def _chain(folder: Path) -> None:
    (folder / "y").symlink_to("../secret")
    (folder / "x").symlink_to("y")


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "x")


def _socket(folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(folder / "x"))


def _device(folder: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("devices need root")
    os.mknod(folder / "x", 0o600 | stat.S_IFCHR, os.makedev(1, 5))


def _hard_link(folder: Path) -> None:
    os.link(folder.parent / "secret", folder / "x")


def _folder(folder: Path) -> None:
    (folder / "x").mkdir()


@pytest.mark.parametrize("make", [_link, _dangling, _chain, _fifo, _socket, _device, _hard_link, _folder])
def test_everything_else_is_refused_at_once(jail: tuple[Path, int], make: Callable[[Path], None]) -> None:
    folder, fd = jail
    make(folder)
    started = time.monotonic()
    with pytest.raises(UntrustedPath, match="'x'"):
        open_untrusted(fd, "x")
    refusals = [item for item in scan_untrusted(fd) if item.path == "x"]
    assert all(isinstance(item, Refusal) for item in refusals)
    assert len(refusals) == (0 if make is _folder else 1)
    assert time.monotonic() - started < 1


@pytest.mark.parametrize("path", ["", ".", "..", "../secret", "/etc/passwd", "a/../../secret", "a//f", "a/", "f\0"])
def test_ways_out_are_refused(jail: tuple[Path, int], path: str) -> None:
    folder, fd = jail
    (folder / "a").mkdir()
    with pytest.raises(UntrustedPath):
        open_untrusted(fd, path)


def test_a_linked_folder_on_the_way_is_refused(jail: tuple[Path, int]) -> None:
    folder, fd = jail
    (folder / "up").symlink_to("..")
    with pytest.raises(UntrustedPath, match="link or no folder"):
        open_untrusted(fd, "up/secret")
    assert [type(item) for item in scan_untrusted(fd)] == [Refusal]
    assert not Below(fd).remove("up/secret", file_identity(os.stat(folder.parent / "secret")))
    assert (folder.parent / "secret").exists()


def test_a_lease_of_the_kernel_does_not_block(jail: tuple[Path, int]) -> None:
    import fcntl

    folder, fd = jail
    previous = signal.signal(signal.SIGIO, signal.SIG_IGN)
    with (folder / "x").open("w") as file:
        fcntl.fcntl(file.fileno(), fcntl.F_SETLEASE, fcntl.F_WRLCK)
        started = time.monotonic()
        with pytest.raises(ArtifactRefused):
            open_untrusted(fd, "x")
        assert time.monotonic() - started < 1
    signal.signal(signal.SIGIO, previous)


def test_scan_is_bounded_in_entries_and_depth(jail: tuple[Path, int]) -> None:
    folder, fd = jail
    for number in range(50):
        (folder / str(number)).write_text("")
    items = list(scan_untrusted(fd, max_entries=10))
    assert len([item for item in items if isinstance(item, Found)]) == 10
    assert isinstance(items[-1], Refusal)
    assert "more than 10 entries" in items[-1].reason
    deep = folder
    for _ in range(100):
        deep = deep / "d"
        deep.mkdir()
    before = len(os.listdir("/proc/self/fd"))
    assert any(isinstance(i, Refusal) and "levels deep" in i.reason for i in scan_untrusted(fd))
    assert len(os.listdir("/proc/self/fd")) == before


def test_swapping_a_file_for_a_link_never_leads_out(jail: tuple[Path, int]) -> None:
    folder, fd = jail
    stop = threading.Event()

    def swap() -> None:
        (folder / "real").mkdir()
        while not stop.is_set():
            (folder / "x.new").write_bytes(b"kernel")
            os.rename(folder / "x.new", folder / "x")
            os.symlink("../secret", folder / "x.new")
            os.rename(folder / "x.new", folder / "x")
            os.rename(folder / "real", folder / "d")
            os.rename(folder / "d", folder / "real")
            os.symlink("..", folder / "d")
            os.unlink(folder / "d")

    thread = threading.Thread(target=swap)
    thread.start()
    seen = set()
    try:
        deadline = time.monotonic() + 1.5
        while time.monotonic() < deadline:
            for path in ("x", "d/secret"):
                try:
                    seen.add(read_untrusted(fd, path, max_bytes=100))
                except (ArtifactError, FileNotFoundError):
                    continue
            list(scan_untrusted(fd))
    finally:
        stop.set()
        thread.join()
    assert seen == {b"kernel"}


_names = st.one_of(
    st.sampled_from(["a", "b", "c", "d"]).map(str.encode),
    st.binary(min_size=1, max_size=20).map(lambda b: b.replace(b"/", b"_").replace(b"\0", b"_")),
).filter(lambda name: name not in (b".", b".."))
_targets = st.sampled_from([b"..", b"../secret", b"/etc/passwd", b"a", b"b/c", b".", b"/proc/self/root", b"/dev/zero"])
_trees = st.recursive(
    st.one_of(
        st.tuples(st.just("file"), st.binary(max_size=20)),
        st.tuples(st.just("link"), _targets),
        st.tuples(st.just("fifo"), st.just(b"")),
        st.tuples(st.just("hard"), st.just(b"")),
    ),
    lambda below: st.tuples(st.just("folder"), st.dictionaries(_names, below, max_size=4)),
    max_leaves=12,
)


def _plant(path: bytes, tree: tuple[str, object], secret: bytes) -> None:
    kind, content = tree
    if kind == "folder":
        os.mkdir(path)
        for name, below in content.items():  # type: ignore[attr-defined]
            _plant(path + b"/" + name, below, secret)
    elif kind == "file":
        Path(os.fsdecode(path)).write_bytes(content)  # type: ignore[arg-type]
    elif kind == "link":
        os.symlink(content, path)  # type: ignore[arg-type]
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        os.link(secret, path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    tree=st.dictionaries(_names, _trees, max_size=5),
    paths=st.lists(st.lists(_names | st.sampled_from([b"..", b".", b""]), max_size=5).map(b"/".join), max_size=8),
)
def test_hostile_trees(tree: dict[bytes, tuple[str, object]], paths: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as base:
        root = os.fsencode(base)
        secret = root + b"/secret"
        Path(os.fsdecode(secret)).write_bytes(SECRET)
        _plant(root + b"/jail", ("folder", tree), secret)
        fd = os.open(root + b"/jail", FOLDER)
        descriptors = len(os.listdir("/proc/self/fd"))
        try:
            items = list(scan_untrusted(fd))
            found = {item.path for item in items if isinstance(item, Found)}
            expected = {path for path, (kind, _) in _walk(tree) if kind == "file"}
            assert found == {os.fsdecode(path) for path in expected if is_text(path)}
            refused = [path for path, (kind, _) in _walk(tree) if kind in ("link", "fifo", "hard")]
            assert len([i for i in items if isinstance(i, Refusal)]) >= len([p for p in refused if is_text(p)])
            for item in items:
                item.path.encode()
            for path in (*paths, *(path for path, _ in _walk(tree))):
                try:
                    data = read_untrusted(fd, path, max_bytes=1000)
                except (ArtifactError, OSError):
                    assert path not in expected
                else:
                    assert ("file", data) == dict(_walk(tree))[path]
            assert len(os.listdir("/proc/self/fd")) == descriptors
        finally:
            os.close(fd)


def _walk(tree: dict[bytes, tuple[str, object]], prefix: bytes = b"") -> Iterator[tuple[bytes, tuple[str, object]]]:
    for name, (kind, content) in tree.items():
        yield prefix + name, (kind, content)
        if kind == "folder":
            yield from _walk(content, prefix + name + b"/")  # type: ignore[arg-type]


def test_a_tree_is_removed_however_deep_and_through_no_link(tmp_path: Path) -> None:
    root, other = tmp_path / "tree", tmp_path / "other"
    for folder in (root, other):
        folder.mkdir()
    (other / "file").write_text("stays")
    here = os.open(root, os.O_RDONLY)
    for name in (b"f", b"\xff\n"):
        os.close(os.open(name, os.O_CREAT, dir_fd=here))
    os.symlink(other, "link", dir_fd=here)
    for _ in range(3_000):
        os.mkdir("d", dir_fd=here)
        os.symlink(other, "link2", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    remove_tree(root)
    assert not root.exists()
    assert (other / "file").read_text() == "stays"
    (tmp_path / "to other").symlink_to(other)
    remove_tree(tmp_path / "to other")
    remove_tree(tmp_path / "nowhere")
    assert [entry.name for entry in tmp_path.iterdir()] == ["other"]


def test_refusals_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox_kernel.untrusted.MAX_REFUSALS", 10)
    for n in range(30):
        (tmp_path / f"{n}{'x' * 200}").symlink_to("nowhere")
    fd = os.open(tmp_path, FOLDER)
    found = list(scan_untrusted(fd))
    os.close(fd)
    assert [item.reason for item in found if isinstance(item, Refusal)][-1] == "20 more that are not taken"
    assert len(found) == 11
    assert len(Refusal("y" * 20_000, "why").path) < 1_100
