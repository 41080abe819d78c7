"""``make gvisor``: sessions under gVisor, on every machine where root can start a Docker Engine of its own.

gVisor (``runsc``) comes from Debian's archive, by apt with its signatures, into ``.cache/gvisor``; nothing is
installed. The engine that knows it runs in a machine within this one (:mod:`campaigns.machine`), so that no other
engine notices. There pytest runs what gVisor has of its own, and the attacks that every session must withstand.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from campaigns.machine import Machine
from sandbox_kernel.errors import EngineError, SandboxError
from sandbox_kernel.provisioning.image import TAG
from sandbox_kernel.provisioning.process import run, say

CACHE = Path(".cache/gvisor").absolute()
SUITE = "trixie"
"""Debian's: the package is one static program. Other than that of backports, a stable suite's index never expires."""
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")

ARGUMENTS = ["--platform=systrap", "--dcache=0"]
RUNTIMES = {
    "runsc": [*ARGUMENTS, "--host-uds=create", "--network=none"],
    "runsc-network": [*ARGUMENTS, "--network=host"],
}
"""As SECURITY.md gives them."""

TESTS = [
    "tests/test_containment_gvisor.py",
    "tests/test_containment.py",
    "tests/test_containment_kills.py",
    "tests/test_containment_files.py",
    "tests/test_deaths.py",
    "tests/test_pool.py::test_a_claimed_session_is_like_any_other",
    "tests/test_pool.py::test_a_claimed_kernel_restarts_dies_and_comes_back",
    "tests/test_pool.py::test_tmpfs",
    "tests/test_session.py::TestEnds",
]
PRIVILEGES = "tests/test_containment.py::TestPrivileges::"
CALLS = f"{PRIVILEGES}test_system_calls_that_are_refused"
OTHERWISE = {
    f"{PRIVILEGES}test_capabilities_and_seccomp": "its /proc has fewer fields; the filter is around gVisor itself",
    f"{PRIVILEGES}test_every_process_is_confined": "the same",
    f"{CALLS}[libc.unshare": "refused with EINVAL",
    f"{CALLS}[libc.syscall(298": "refused with ENODEV",
    f"{CALLS}[libc.syscall(304": "refused with EOPNOTSUPP",
    f"{CALLS}[libc.mknod(b'/session/dev'": "allowed: its devices are gVisor's own",
    "tests/test_containment.py::TestSight::test_the_host_is_not_visible": "no process sees another's /proc/<pid>/root",
    "tests/test_containment.py::TestLimits::test_cpu": "its own account of processor time knows nothing of the limit",
    "tests/test_containment_files.py::TestArtifacts::test_special_files_and_hard_links": "a FIFO stays within gVisor",
}
"""Node ids (or how they begin) of what holds otherwise under gVisor -> how; test_containment_gvisor.py tries most."""


def fetch() -> Path:
    """The program ``runsc``, out of the cache or of Debian's archive. Raises EngineError saying what is missing."""
    program = CACHE / "runsc"
    if program.exists():
        return program
    for needed in ("apt-get", "dpkg-deb", str(KEYRING)):
        if shutil.which(needed) is None and not Path(needed).exists():
            raise EngineError(
                f"{needed} is missing: gVisor is fetched as Debian's package. To mend that: apt-get install "
                f"debian-archive-keyring, or (not on Debian or Ubuntu) put a runsc of https://gvisor.dev at {program}"
            )
    apt = CACHE / "apt"
    shutil.rmtree(apt, ignore_errors=True)
    (apt / "lists" / "partial").mkdir(parents=True)
    (apt / "sources.list").write_text(f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {SUITE} main\n")
    # Read after this machine's configuration: its proxies are wanted, its hooks would act on its own apt.
    (apt / "apt.conf").write_text(
        "#clear APT::Update;\n"
        "#clear DPkg;\n"
        'APT::Sandbox::User "root";\n'  # another may not be let into this folder
        'APT::Update::Error-Mode "any";\n'
        'Acquire::Languages "none";\n'
        'Dir::Etc::SourceParts "/dev/null";\n'
        'Dir::Etc::Preferences "/dev/null";\n'
        'Dir::Etc::PreferencesParts "/dev/null";\n'
        f'Dir::Etc::SourceList "{apt}/sources.list";\n'
        f'Dir::State::Lists "{apt}/lists";\n'
        f'Dir::Cache "{apt}";\n'
    )
    say(f"fetching runsc out of Debian {SUITE} into {program}; nothing is installed")
    apt_get = ["env", f"--chdir={apt}", "apt-get", f"--config-file={apt}/apt.conf", "--quiet=2"]
    run([*apt_get, "update"], say)
    run([*apt_get, "download", "runsc"], say)
    (package,) = apt.glob("runsc_*.deb")
    run(["dpkg-deb", "--extract", str(package), str(apt / "package")], say)
    (apt / "package" / "usr" / "bin" / "runsc").rename(program)
    shutil.rmtree(apt)
    return program


def configure(program: Path) -> None:
    """Tell the machine's engine of gVisor."""
    runtimes = {name: {"path": str(program), "runtimeArgs": arguments} for name, arguments in RUNTIMES.items()}
    (CACHE / "machine" / "config").mkdir(parents=True, exist_ok=True)
    (CACHE / "machine" / "config" / "daemon.json").write_text(json.dumps({"runtimes": runtimes}, indent=1))


def main(arguments: list[str]) -> int:
    if os.geteuid() != 0:
        say("make gvisor starts a Docker Engine of its own beside yours, which only root may: sudo make gvisor")
        return 1
    began = time.monotonic()
    try:
        program = fetch()
        configure(program)
        say(subprocess.run([program, "--version"], check=True, capture_output=True, text=True).stdout.splitlines()[0])
        say(f"an engine of its own in {CACHE / 'machine'}:")
        with Machine(CACHE / "machine") as machine:
            machine.take(TAG)
            say(f"  ready after {time.monotonic() - began:.0f} s")
            left_out = [argument for node in OTHERWISE for argument in ("--deselect", node)]
            command = [sys.executable, "-m", "pytest", *TESTS, *left_out, *arguments]
            return machine.run(command, {"SANDBOX_RUNTIME": "runsc"})
    except SandboxError as exc:
        say(str(exc))
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
