"""The image that sessions run in, how it is built, and the engine it is built on."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import docker
import pytest

from sandbox_kernel import Settings
from sandbox_kernel.doctor import checks, fit
from sandbox_kernel.errors import EngineError, EngineUnavailable
from sandbox_kernel.provisioning import bringup
from sandbox_kernel.provisioning.image import (
    RECIPE,
    RECIPE_LABEL,
    build_image,
    image_folder,
    is_current,
    recipe_hash,
)
from sandbox_kernel.provisioning.probe import probe
from sandbox_kernel.provisioning.runtime import kernel_ids, runtime_base

CONFINED = [
    *("--network", "none", "--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--memory", "1g", "--pids-limit", "256", "--tmpfs", "/tmp:mode=1777", "--tmpfs", "/session:mode=1777"),
]

ANALYSIS = """
import warnings; warnings.simplefilter("error")
import getpass, json, os, sys
import matplotlib; matplotlib.use("agg")
import matplotlib.pyplot as plt, numpy as np, pandas as pd, seaborn as sns
import PIL, pyarrow.parquet, scipy.stats, sklearn.linear_model
frame = pd.DataFrame({"x": np.arange(50.0), "y": np.arange(50.0) * 2 + 1})
sns.regplot(frame, x="x", y="y").set_title("ä → ∑")
plt.savefig("/session/plot.png")
frame.to_parquet("/session/frame.parquet")
model = sklearn.linear_model.LinearRegression().fit(frame[["x"]], frame["y"])
print(json.dumps({
    "python": sys.executable, "uid": os.getuid(), "cwd": os.getcwd(), "home": os.path.expanduser("~"),
    "user": getpass.getuser(), "slope": round(float(model.coef_[0]), 6),
    "rows": len(pd.read_parquet("/session/frame.parquet")), "size": plt.imread("/session/plot.png").shape,
    "correlated": bool(scipy.stats.pearsonr(frame.x, frame.y).statistic > 0.999),
}))
"""


def run_in(image: str, *arguments: str, user: str = "1000:1000", program: str = "") -> str:
    """stdout of a confined container that ran to its end; its stderr must be empty."""
    done = subprocess.run(
        ["docker", "run", "--rm", "-i", "--user", user, *CONFINED, image, *arguments],
        input=program,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("uid", [1000, 4711], ids=["uid of the image", "any other uid"])
def test_analysis_runs_confined(image: str, uid: int) -> None:
    report = json.loads(run_in(image, "python3", "-", user=f"{uid}:{uid}", program=ANALYSIS))
    assert report["python"] == "/opt/venv/bin/python3"
    assert report["uid"] == uid
    assert (report["cwd"], report["home"], report["user"]) == ("/session", "/session", "sandbox")
    assert report["slope"] == 2.0
    assert report["rows"] == 50
    assert report["correlated"]
    assert report["size"] == [480, 640, 4]


def test_font_cache_is_the_images_own(image: str) -> None:
    """Byte for byte: a cache that matplotlib found wanting would have been written anew."""
    program = (
        "import os, sys, filecmp, matplotlib.font_manager\n"
        "ours = os.path.join(sys.prefix, 'share', 'matplotlib-cache')\n"
        "names = os.listdir(ours)\n"
        "print(len(names), filecmp.cmpfiles(ours, os.environ['MPLCONFIGDIR'], names, shallow=False)[0] == names)"
    )
    assert run_in(image, "python3", "-", program=program) == "1 True\n"


def test_versions_are_those_of_the_lock(image: str) -> None:
    lock = (image_folder() / "requirements.lock").read_text()
    locked = {name.replace("_", "-"): number for name, number in re.findall(r"^([\w.-]+)==(\S+)", lock, re.M)}
    program = (
        "import json, importlib.metadata as m\n"
        "print(json.dumps({d.name.lower().replace('_', '-'): d.version for d in m.distributions()}))"
    )
    assert json.loads(run_in(image, "python3", "-", program=program)) == locked


def test_the_standard_library_is_compiled(image: str) -> None:
    """On a read-only root what is not compiled is compiled again at every start."""
    program = "import sys, os, asyncio, json; print([m for m in (asyncio, json) if not os.path.exists(m.__cached__)])"
    assert run_in(image, "python3", "-", program=program) == "[]\n"


def test_a_current_image_is_not_built_again(image: str, engine: docker.DockerClient) -> None:
    lines: list[str] = []
    began = time.monotonic()
    identity = build_image(image, progress=lines.append)
    assert time.monotonic() - began < 3
    assert lines == [f"{image} is current."]
    assert identity == engine.images.get(image).id
    assert engine.images.get(image).labels[RECIPE_LABEL] == recipe_hash()


def test_another_recipe_is_not_current(image: str, engine: docker.DockerClient) -> None:
    assert is_current(image)
    assert not is_current(image, base="debian:trixie")
    assert not is_current("sandbox:no-such-tag")


def test_a_build_tells_its_steps_and_fails_by_name(image: str, engine: docker.DockerClient) -> None:
    """A base without Python: the build's own last lines are in the error, and no image is left under the tag."""
    empty = "sandbox-test:empty"
    engine.api.import_image_from_data(b"\0" * 10240, *empty.split(":"))
    base = engine.images.get(empty).id
    lines: list[str] = []
    try:
        with pytest.raises(EngineError, match="sandbox-test:empty failed"):
            build_image("sandbox-test:built", base=empty, progress=lines.append)
    finally:
        for layer in engine.api.images(all=True):
            if layer["ParentId"] == base:
                engine.images.remove(layer["Id"], force=True)
        engine.images.remove(empty)
    assert [line for line in lines if line.startswith("[")] == [
        "[1/3] base image",
        lines[2],
        "[3/3] build sandbox-test:built upon sandbox-test:empty",
    ]
    with pytest.raises(docker.errors.ImageNotFound):
        engine.images.get("sandbox-test:built")


def test_a_base_that_is_nowhere(engine: docker.DockerClient) -> None:
    with pytest.raises(EngineError, match=r"'localhost:1/no/such:base' is not on the engine and cannot be pulled"):
        build_image("sandbox-test:built", base="localhost:1/no/such:base", progress=lambda _line: None)


def test_the_recipe_is_what_the_dockerfile_copies() -> None:
    """A file the Dockerfile takes and the hash leaves out would change the image without a rebuild."""
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (image_folder() / "Dockerfile").read_text(), re.M)
    names = {name for line in copied for name in line.split() if name != "wheels*"}
    assert names | {"Dockerfile"} == set(RECIPE)


# --- the engine -------------------------------------------------------------------------------


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    endpoint = f"unix://{tmp_path}/docker.sock"
    monkeypatch.setenv("DOCKER_HOST", endpoint)
    return endpoint


def test_no_engine_is_said_with_its_remedy(no_engine: str) -> None:
    status = bringup.engine_status()
    assert not status.answers
    assert no_engine in status.detail
    assert "FileNotFoundError" in status.detail
    with pytest.raises(EngineUnavailable, match="DOCKER_HOST"):
        bringup.bring_up(assume_yes=True, progress=lambda _line: None)
    with pytest.raises(EngineUnavailable, match="sandbox-kernel engine up"):
        build_image(progress=lambda _line: None)


def test_an_engine_that_answers_is_left_alone(engine: docker.DockerClient) -> None:
    lines: list[str] = []
    status = bringup.bring_up(progress=lines.append)
    assert status.answers
    assert lines == [status.detail]
    assert status.version == engine.version()["Version"]


def test_nothing_is_done_unasked(engine: docker.DockerClient) -> None:
    """Where the socket is not there (an empty /run), the plan is shown; without --yes or a terminal nothing runs."""
    before = processes("dockerd")
    script = f"mount -t tmpfs none /run && exec {sys.executable} -m sandbox_kernel.cli engine up"
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "DOCKER_HOST"},
    )
    assert done.returncode == 3, done
    assert "To bring one up:" in done.stdout
    assert "dockerd" in done.stdout
    assert "To mend it: sandbox-kernel engine up --yes" in done.stderr
    assert processes("dockerd") == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may start a daemon")
def test_a_daemon_is_started_outlives_its_starter_and_is_started_again(engine: docker.DockerClient) -> None:
    """Beside the engine that runs: in a network, a /run and a /var/lib/docker of its own.

    The second round begins as after a crash: the pid files are there and name a process that is no daemon.
    """
    python = sys.executable
    script = f"""
        set -e
        mount -t tmpfs none /run
        mount -t tmpfs none /var/lib/docker
        mount -t tmpfs none /var/log
        trap stop EXIT
        stop() {{ kill -9 $(cat /run/docker.pid) $(cat /run/docker/containerd/containerd.pid); }}
        ended() {{ ! grep -sq State:.[^Z] /proc/$1/status; }}
        {python} -m sandbox_kernel.cli engine up --yes
        pid=$(cat /run/docker.pid)
        echo fds $(readlink /proc/$pid/fd/0 /proc/$pid/fd/1 /proc/$pid/fd/2)
        echo leads $(ps -o sid= -p $pid) $pid
        stop
        until ended $pid; do sleep 0.05; done
        echo $$ | tee /run/docker.pid > /run/docker/containerd/containerd.pid
        {python} -m sandbox_kernel.cli engine up --yes
    """
    done = subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", script],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        env={name: value for name, value in os.environ.items() if name != "DOCKER_HOST"},
    )
    assert done.returncode == 0, done
    lines = done.stdout.splitlines()
    assert sum(line.startswith("Docker Engine ") for line in lines) == 2
    assert f"fds /dev/null {bringup.LOG} {bringup.LOG}" in lines
    (leads,) = [line.split()[1:] for line in lines if line.startswith("leads ")]
    assert leads[0] == leads[1]


def processes(name: str) -> set[str]:
    """Pids of the programs of that name."""
    found = set()
    for comm in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            if comm.read_text().strip() == name:
                found.add(comm.parent.name)
    return found


# --- doctor -----------------------------------------------------------------------------------


def test_the_probe_finds_the_limits_in_force(image: str) -> None:
    seen = probe(image)
    assert False not in seen.limits.values()
    assert seen.seccomp
    assert seen.capabilities == 0
    assert seen.uid == kernel_ids()[0] != 0
    assert seen.ipc
    assert not list(runtime_base().glob("probe-*"))


def test_doctor_finds_this_machine_fit(image: str, tmp_path: Path) -> None:
    found = {check.name: check for check in checks(Settings(sessions_root=tmp_path / "deep" / "sessions"))}
    assert fit(list(found.values())), [check for check in found.values() if not check.ok]
    assert {"Python", "engine", "image", "kernel uid", "ipc", "limits", "seccomp", "gVisor"} <= set(found)
    assert not (tmp_path / "deep").exists()
    assert all(check.remedy == "" for check in found.values() if check.ok)


def test_doctor_without_an_engine(no_engine: str) -> None:
    found = checks(Settings())
    assert not fit(found)
    (amiss,) = [check for check in found if check.required and not check.ok]
    assert amiss.name == "engine"
    assert amiss.remedy
    assert fit(checks(Settings(engine="local")))


def test_doctor_names_what_settings_ask_in_vain(image: str) -> None:
    found = {check.name: check for check in checks(Settings(image="no/such:image", runtime="no-such-runtime"))}
    assert not found["image"].ok
    assert "no/such:image" in found["image"].remedy
    assert not found["runtime"].ok
    assert "runc" in found["runtime"].remedy
    assert "limits" not in found
