"""Hands files out of a running container, where host and kernel share no folder (TMPFS, Kubernetes).

Run beside the kernel by the host, with the host on stdin and stdout::

    python3 -I -S /opt/sandbox-kernel/agent.py --artifacts /session/artifacts --state /session/state

One request per line (JSON with ``op``); each answer is one JSON line, then exactly ``size`` raw bytes when the
line has ``size``. Requests are answered in order and may be sent ahead. A failure is ``{"error", "code"}``.

====================  ====================================================================================
``list``              ``skip``, ``tag`` → body ``{"files": [[path, ino, size, mtime_ns, open]],
                      "refused": [[path, reason]], "more"}``, or ``{"same": true}`` when ``tag`` still holds
``get``               ``path`` below artifacts → the bytes, then one line ``{"changed"}``
``remove``            ``files``: ``[[path, ino, size, mtime_ns]]`` → body: the paths removed, which are those
                      unchanged and not open for writing
``state``             ``name, limit`` → the bytes of a file in the state folder, then ``{"changed"}``
``export``            ``path``: any file the kernel's user can read → the bytes, then ``{"changed"}``
``stat``              ``path`` → ``{"kind", "size_now", "mtime_ns"}``
``put``               ``token, name``, then frames (4 bytes length, bytes; 0 ends, 2**32-1 gives up)
``publish``           ``token, path`` → what was put stands at ``path`` below data, at once
``discard``           ``token`` → what was put is removed
``link``              frames of a JSON list ``[[path, target]]`` → links below data
``selected``          → body: what was published
====================  ====================================================================================

``put``, ``publish``, ``link``, ``selected`` are for an agent run as user 0 with ``--data``: the folder belongs to
root, so that the kernel reads and cannot write. Nothing here protects the host: whoever runs as the agent's user
can speak in its place, and the host believes no answer. Standard library only; Python 3.9 or later.
"""

# It starts in milliseconds beside the kernel: no pathlib, no contextlib.
# ruff: noqa: SIM105

from __future__ import annotations

import errno
import json
import os
import stat
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # `typing` itself would take as long to import as all the rest
    from collections.abc import Collection, Iterable, Iterator
    from typing import Any, BinaryIO

CHUNK = 1 << 18
LINE_LIMIT = 1 << 20
PAGE_FILES = 10000
PAGE_BYTES = 1 << 22
PAGE_REFUSED = 100
FRAME_LIMIT = 1 << 24
GIVE_UP = 0xFFFFFFFF
STAGING = ".staging"


class Refused(Exception):
    """What the request asks for is not to be had; the text goes to the host."""


def main(argv: list[str]) -> None:
    roots = {"artifacts": "/session/artifacts", "state": "/session/state"}
    roots.update(data="/data", selected="/opt/sandbox-selected")
    for flag, value in zip(argv[::2], argv[1::2]):  # noqa: B905 - Python 3.9 has no `strict`
        roots[flag[2:]] = value
    agent = Agent(roots, sys.stdin.buffer)
    while agent.answer():
        pass


class Agent:
    """One connection: requests from ``source``, answers to descriptor 1."""

    def __init__(self, roots: dict[str, str], source: BinaryIO) -> None:
        self.roots = roots
        self.source = source

    def answer(self) -> bool:
        """Answers one request; False at the end of the input."""
        line = self.source.readline(LINE_LIMIT)
        if not line.endswith(b"\n"):
            return False
        request = json.loads(line)
        operation = getattr(self, "do_" + request.pop("op"))
        try:
            operation(**request)
        except Refused as exc:
            say(error=str(exc), code="refused")
        except OSError as exc:
            say(error=exc.strerror or str(exc), code=errno.errorcode.get(exc.errno or 0, "EIO"))
        return True

    # --- reading ------------------------------------------------------------------------------

    def do_list(self, skip: int = 0, tag: str | None = None) -> None:
        files, refused, more = walk(self.roots["artifacts"], skip)
        if files:
            writing = open_for_writing({(item[1], item[5]) for item in files})
            files = [[*item[:4], (item[1], item[5]) in writing] for item in files]
        body = json.dumps({"files": files, "refused": refused, "more": more}).encode()
        now = str(hash(body))
        if now == tag:
            say(same=True)
        else:
            say(body, tag=now)

    def do_get(self, path: str) -> None:
        send_file(below(self.roots["artifacts"], path), os.O_NOFOLLOW)

    def do_state(self, name: str, limit: int) -> None:
        send_file(below(self.roots["state"], name), os.O_NOFOLLOW, limit)

    def do_export(self, path: str) -> None:
        send_file(os.path.join("/session", path), 0)

    def do_stat(self, path: str) -> None:
        about = os.lstat(os.path.join("/session", path))
        say(kind=kind(about.st_mode), size_now=about.st_size, mtime_ns=about.st_mtime_ns)

    def do_remove(self, files: list[list[Any]]) -> None:
        found: list[tuple[str, str, tuple[int, int]]] = []
        for path, *was in files:
            full = below(self.roots["artifacts"], path)
            try:
                about = os.lstat(full)
            except OSError:
                continue
            if [about.st_ino, about.st_size, about.st_mtime_ns] == was:
                found.append((path, full, (about.st_ino, about.st_dev)))
        writing = open_for_writing({item[2] for item in found}) if found else set()
        removed = []
        for path, full, identity in found:
            if identity not in writing:
                try:
                    os.unlink(full)
                except OSError:
                    continue  # it is in a folder that was made read-only, say: the others can go
                removed.append(path)
        say(json.dumps(removed).encode())

    # --- data sets (user 0) -------------------------------------------------------------------

    def do_put(self, token: str, name: str) -> None:
        target = os.path.join(self.staging(), token)
        if name:
            target = os.path.join(target, name)
        frames = self.frames()
        try:
            say(put=receive(frames, target))
        except OSError as exc:
            # Said at once, so that the host can stop sending; what it has sent by then is read and dropped.
            remove_tree(os.path.join(self.staging(), token))
            self.tidy()
            say(error=exc.strerror, code=errno.errorcode.get(exc.errno or 0, "EIO"))
            for _ in frames:
                pass

    def frames(self) -> Iterator[bytes | None]:
        """The payload's frames; None as the last when the host gave up or is gone."""
        while True:
            header = self.source.read(4)
            size = int.from_bytes(header, "big")
            if len(header) < 4 or size == GIVE_UP:
                yield None
                return
            if size == 0:
                return
            if size > FRAME_LIMIT:
                sys.exit(2)
            yield self.source.read(size)

    def do_publish(self, token: str, path: str) -> None:
        source = os.path.join(self.staging(), token)
        target = below(self.roots["data"], path)
        size = 0
        if not os.path.lexists(source):
            os.mkdir(source)  # a folder without files
        if os.path.isdir(source):
            for folder, _, names in os.walk(source):
                os.chmod(folder, 0o755)
                size += sum(os.lstat(os.path.join(folder, name)).st_size for name in names)
        else:
            size = os.lstat(source).st_size
        os.makedirs(os.path.dirname(target), mode=0o755, exist_ok=True)
        os.rename(source, target)
        with open(os.path.join(self.roots["selected"], token), "w") as file:
            json.dump([path, size], file)
        self.tidy()
        say(published=size)

    def do_discard(self, token: str) -> None:
        remove_tree(os.path.join(self.roots["data"], STAGING, token))
        self.tidy()
        say(discarded=True)

    def do_selected(self) -> None:
        found = []
        for name in os.listdir(self.roots["selected"]):
            with open(os.path.join(self.roots["selected"], name)) as file:
                found.append(json.load(file))
        say(json.dumps(found).encode())

    def do_link(self) -> None:
        payload = b"".join(frame for frame in self.frames() if frame is not None)
        for path, target in json.loads(payload):
            full = below(self.roots["data"], path)
            os.makedirs(os.path.dirname(full), mode=0o755, exist_ok=True)
            if not os.path.lexists(full):
                os.symlink(target, full)
        say(linked=True)

    def tidy(self) -> None:
        try:
            os.rmdir(os.path.join(self.roots["data"], STAGING))
        except OSError:
            pass  # not there, or in use

    def staging(self) -> str:
        folder = os.path.join(self.roots["data"], STAGING)
        os.makedirs(folder, mode=0o700, exist_ok=True)
        return folder


def receive(frames: Iterable[bytes | None], target: str) -> int:
    """Writes ``frames`` into the new file ``target``; its size."""
    total = 0
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    os.makedirs(os.path.dirname(target), exist_ok=True)
    try:
        file = os.open(target, flags, 0o444)
    except FileNotFoundError:  # another agent tidied up in between
        os.makedirs(os.path.dirname(target), exist_ok=True)
        file = os.open(target, flags, 0o444)
    try:
        for frame in frames:
            if frame is None:
                raise OSError(errno.ECANCELED, "given up")
            view = memoryview(frame)
            while view:
                view = view[os.write(file, view) :]
            total += len(frame)
    finally:
        os.close(file)
    return total


def say(body: bytes | None = None, **header: Any) -> None:
    """One answer: the header line, then the body it announces."""
    if body is not None:
        header["size"] = len(body)
    write_all(json.dumps(header).encode() + b"\n" + (body or b""))


def write_all(data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(1, view) :]


def below(root: str, path: str) -> str:
    """``path`` below ``root``; the host has checked it, and this process is not one to trust, but mistakes end here."""
    parts = path.split("/")
    if not path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        raise Refused("not a path below %s" % root)
    return os.path.join(root, *parts)


def kind(mode: int) -> str:
    for test, name in (
        (stat.S_ISREG, "file"),
        (stat.S_ISDIR, "folder"),
        (stat.S_ISLNK, "symbolic link"),
        (stat.S_ISFIFO, "FIFO"),
        (stat.S_ISSOCK, "socket"),
    ):
        if test(mode):
            return name
    return "device"


def send_file(path: str, flags: int, limit: int | None = None) -> None:
    """Header with ``size`` and what identifies the file, exactly that many bytes, and whether it held still."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | flags)
    try:
        before = os.fstat(file)
        if not stat.S_ISREG(before.st_mode):
            raise Refused("a %s, not a file" % kind(before.st_mode))
        if limit is not None and before.st_size > limit:
            raise Refused("%d bytes, more than the %d allowed" % (before.st_size, limit))
        size = before.st_size
        if not size and os.read(file, 1):
            raise Refused("it has content but no size, like those of /proc: copy it first")
        say(size=size, ino=before.st_ino, mtime_ns=before.st_mtime_ns)
        sent = 0
        while sent < size:
            count = os.sendfile(1, file, sent, min(CHUNK, size - sent))
            if count == 0:
                break
            sent += count
        short = sent < size
        while sent < size:
            pad = b"\0" * min(CHUNK, size - sent)
            write_all(pad)
            sent += len(pad)
        after = os.fstat(file)
        held = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
        say(changed=short or not held)
    finally:
        os.close(file)


def walk(root: str, skip: int) -> tuple[list[list[Any]], list[list[str]], bool]:
    """``(files, refused, more)`` below ``root``, past the first ``skip`` files: one page of them.

    A file is ``[path, ino, size, mtime_ns, open, dev]``.
    """
    files: list[list[Any]] = []
    refused: list[list[str]] = []
    folders, length = [""], 0
    while folders:
        prefix = folders.pop()
        try:
            entries = os.scandir(os.path.join(root, prefix))
        except OSError as exc:
            if prefix:
                refused.append([shown(prefix), str(exc.strerror)])
            continue
        with entries:
            for entry in entries:
                path = prefix + "/" + entry.name if prefix else entry.name
                try:
                    about = entry.stat(follow_symlinks=False)
                except OSError:
                    continue  # gone since it was listed
                reason = refusal(path, about)
                if reason is None and stat.S_ISDIR(about.st_mode):
                    folders.append(path)
                elif reason is not None:
                    if len(refused) < PAGE_REFUSED:
                        refused.append([shown(path), reason])
                elif skip:
                    skip -= 1
                else:
                    files.append([path, about.st_ino, about.st_size, about.st_mtime_ns, False, about.st_dev])
                    length += len(path)
                    if len(files) >= PAGE_FILES or length > PAGE_BYTES:
                        return files, refused, True
    return files, refused, False


def refusal(path: str, about: os.stat_result) -> str | None:
    """Why ``path`` is not handed out, or None."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "its name is not valid UTF-8"
    if stat.S_ISREG(about.st_mode):
        return "a hard link: the file has another name" if about.st_nlink > 1 else None
    return None if stat.S_ISDIR(about.st_mode) else "a %s, not a file" % kind(about.st_mode)


def shown(path: str) -> str:
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def open_for_writing(wanted: Collection[tuple[int, int]]) -> set[tuple[int, int]]:
    """Those of ``wanted`` (inode, device) that some process of this user has open for writing."""
    found: set[tuple[int, int]] = set()
    for pid in filter(str.isdigit, os.listdir("/proc")):
        folder = "/proc/" + pid + "/fd/"
        try:
            names = os.listdir(folder)
        except OSError:
            continue  # another user's, or gone
        for name in names:
            try:
                # The mode of the link itself says how the descriptor was opened.
                if not os.lstat(folder + name).st_mode & stat.S_IWUSR:
                    continue
                about = os.stat(folder + name)
            except OSError:
                continue
            if (about.st_ino, about.st_dev) in wanted:
                found.add((about.st_ino, about.st_dev))
    return found


def remove_tree(path: str) -> None:
    if not os.path.isdir(path) or os.path.islink(path):
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        return
    for name in os.listdir(path):
        remove_tree(os.path.join(path, name))
    os.rmdir(path)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (BrokenPipeError, KeyboardInterrupt):
        pass  # the host is gone
