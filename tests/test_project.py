"""The project's own promises: its layers, its public names, its wheel."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import sandbox_kernel
from sandbox_kernel import errors

ROOT = Path(__file__).parents[1]
ENGINE_CLIENTS = {"docker", "kubernetes", "podman"}
IN_THE_KERNEL = {"IPython", "ipykernel", "jupyter_client", "tornado", "traitlets", "zmq"}
"""Beside the standard library: what every image with ipykernel has."""


# --- layers -----------------------------------------------------------------------------------


@cache
def rooms() -> dict[str, int]:
    """Path below ``sandbox_kernel/`` (a file, or a folder with its slash) -> layer, from docs/architecture.md."""
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Rooms")[2].partition("\n## ")[0]
    found: dict[str, int] = {}
    for layer, names in re.findall(r"^\| (\d|–) \| ([^|]+) \|", table, re.M):
        for name in re.findall(r"`([^`]+)`", names):
            found[name] = -1 if layer == "–" else int(layer)
    return found


def sources() -> list[Path]:
    return sorted([*(ROOT / "sandbox_kernel").rglob("*.py"), *(ROOT / "viewer").rglob("*.py")])


def room_of(path: Path) -> str | None:
    """The room a file is in: the longest entry of the table that names it or a folder above it."""
    name = path.relative_to(ROOT).as_posix()
    name = name.removeprefix("sandbox_kernel/") if name.startswith("sandbox_kernel/") else f"../{name}"
    fitting = [room for room in rooms() if name == room or (room.endswith("/") and name.startswith(room))]
    return max(fitting, key=len, default=None)


def layer_of(path: Path) -> int:
    room = room_of(path)
    assert room is not None, f"{path.relative_to(ROOT)} is missing in the table of docs/architecture.md"
    return rooms()[room]


def imported(path: Path, *, types: bool = True) -> Iterator[tuple[str, int]]:
    """Dotted names that a file imports anywhere, with their line; ``types``: those under TYPE_CHECKING too."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    tree = ast.parse(path.read_bytes())
    if not types:
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            # `from package import module` imports the module.
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def file_of(name: str) -> Path | None:
    """The file of ours that ``import name`` reaches, None for what is not ours."""
    parts = name.split(".")
    if parts[0] not in ("sandbox_kernel", "viewer"):
        return None
    while parts:
        stem = ROOT.joinpath(*parts)
        for candidate in (stem.with_suffix(".py"), stem / "__init__.py"):
            if candidate.is_file():
                return candidate
        parts.pop()
    return None


def test_every_file_has_a_room() -> None:
    homeless = [str(path.relative_to(ROOT)) for path in sources() if room_of(path) is None]
    assert homeless == [], "name them in the table of docs/architecture.md"


def test_every_room_exists() -> None:
    assert rooms()
    for room in rooms():
        assert (ROOT / "sandbox_kernel" / room).exists(), f"docs/architecture.md names {room}"


def test_imports_point_down() -> None:
    wrong = []
    for path in sources():
        own = layer_of(path)
        for name, line in imported(path):
            target = file_of(name)
            if target is None or target == path or target == ROOT / "sandbox_kernel" / "__init__.py":
                continue
            if layer_of(target) > own:
                wrong.append(f"{path.relative_to(ROOT)}:{line} (layer {own}) imports {name}")
    assert wrong == []


def test_imports_go_in_no_circle() -> None:
    """Within a layer too; names that only mypy needs may."""
    graph = {
        path: {t for name, _ in imported(path, types=False) if (t := file_of(name)) and t != path} for path in sources()
    }
    graph = {path: {t for t in targets if t.name != "__init__.py"} for path, targets in graph.items()}
    done: set[Path] = set()

    def visit(path: Path, trail: tuple[Path, ...]) -> None:
        assert path not in trail, " -> ".join(str(p.relative_to(ROOT)) for p in (*trail[trail.index(path) :], path))
        if path not in done:
            for target in graph[path]:
                visit(target, (*trail, path))
            done.add(path)

    for path in graph:
        visit(path, ())


def test_only_provisioning_knows_the_engine() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        for name, line in imported(path)
        if name.split(".")[0] in ENGINE_CLIENTS and room_of(path) != "provisioning/"
    ]
    assert wrong == []


def kernel_side() -> list[Path]:
    return sorted((ROOT / "sandbox_kernel" / "kernel_side").glob("*.py"))


@pytest.mark.parametrize("path", kernel_side(), ids=lambda path: path.name)
def test_the_kernels_side_stands_alone(path: Path) -> None:
    """It runs in any image with ipykernel and Python 3.9: nothing else imported, no newer syntax.

    Its package has another name there, so it may not call itself by ours.
    """
    tree = ast.parse(path.read_bytes(), feature_version=(3, 9))
    absolute = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom) and node.level == 0
            else []
        )
    }
    assert absolute <= sys.stdlib_module_names | IN_THE_KERNEL
    assert all(target.parent == path.parent for name, _ in imported(path) if (target := file_of(name)))


@pytest.mark.parametrize("module", ["sandbox_kernel", "viewer"])
def test_what_only_reads_never_loads_an_engines_client(module: str) -> None:
    program = f"import sys, {module}; print(sorted({ENGINE_CLIENTS} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "[]\n"


# --- public names -----------------------------------------------------------------------------


def test_every_public_name_is_there() -> None:
    for name in sandbox_kernel.__all__:
        assert getattr(sandbox_kernel, name) is not None
        assert name in dir(sandbox_kernel)
    assert {"SessionManager", "Settings", "SessionStorage", "DatasetAccess", "Session", "Artifact"} <= set(
        sandbox_kernel.__all__
    )
    with pytest.raises(AttributeError, match="no_such_name"):
        sandbox_kernel.no_such_name  # noqa: B018


def test_what_type_checkers_see_is_what_is_there() -> None:
    tree = ast.parse(Path(sandbox_kernel.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert sorted(name for name in seen if name) == sandbox_kernel.__all__
    for name, module in seen.items():
        assert getattr(importlib.import_module(str(module)), str(name)) is getattr(sandbox_kernel, str(name))


def test_all_errors_have_one_root_and_stand_in_the_tree() -> None:
    tree = inspect.getdoc(errors) or ""
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        assert issubclass(kind, errors.SandboxError)
        assert re.search(rf"\b{name}\b", tree), f"{name} is missing in the tree of errors.py"
        assert kind.__doc__


@pytest.mark.parametrize(
    "entry", [e for e in entry_points(group="jupyter_client.kernel_provisioners") if e.name.startswith("sandbox")]
)
def test_provisioners_load(entry: object) -> None:
    from jupyter_client.provisioning import KernelProvisionerBase

    assert issubclass(entry.load(), KernelProvisionerBase)  # type: ignore[attr-defined]


# --- the wheel --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_the_wheel_holds_what_git_holds(wheel: Path) -> None:
    listed = subprocess.run(
        ["git", "ls-files", "sandbox_kernel", "viewer"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
    assert [name for name in listed if not (wheel / name).is_file()] == []


def test_the_wheel_builds_the_image_outside_the_checkout(wheel: Path) -> None:
    program = (
        "from sandbox_kernel.provisioning.image import image_folder, recipe_hash\nprint(image_folder(), recipe_hash())"
    )
    outside, inside = (
        subprocess.run(
            [sys.executable, "-c", program], cwd="/", env={"PYTHONPATH": str(path)}, capture_output=True, text=True
        ).stdout.split()
        for path in (wheel, ROOT)
    )
    assert outside[0] == str(wheel / "sandbox_kernel" / "_image")
    assert outside[1] == inside[1]


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == sandbox_kernel.__version__
