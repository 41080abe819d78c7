"""The container's command: imports ipykernel once, forks the kernel, and forks it anew when the host says so.

    python3 /opt/sandbox-kernel/launch.py [options.json]      (default: boot/options.json beside this file)

| signal  | what happens                                                                                        |
| ------- | --------------------------------------------------------------------------------------------------- |
| SIGHUP  | the kernel and everything it started are killed; options are read again; a fresh kernel is forked    |
| SIGTERM | passed on; after 1 s everything is killed; exit 143                                                  |
| SIGINT  | passed on to the kernel's process group (an interrupt)                                               |

A kernel that ends by itself ends the supervisor: with its exit code, or 128 + its signal, and one line on stderr.
Exit 78: this image has no ipykernel, or one too old for the keys it is given. Exit 66: the options or the connection
file cannot be read.

Options (all but ``connection_file`` may be left out): ``connection_file`` (Jupyter's own format; read, never written);
``imports`` modules to import beforehand; ``trims``, ``mask_secrets``, ``state_dir`` for the hook; ``artifacts_dir`` is
made when it is missing; ``env`` and ``secrets_file`` (a JSON object) become environment variables of the kernel only;
``cwd``.

The supervisor stays single-threaded and makes no zmq context: both would not survive the fork.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import types
import warnings
from typing import Any, Dict, List, Optional

HERE = os.path.dirname(os.path.abspath(__file__))
PACKAGE = "_sandbox_kernel_side"
"""The name this folder is imported by; not on ``sys.path``, where a cell's ``import hook`` would find it."""

EX_NOINPUT, EX_CONFIG = 66, 78
TERM_GRACE_S = 1.0
KILL_LIMIT_S = 10.0
EXIT_LIMIT_S = 5.0
HANDLED = {signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGCHLD}
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
CONNECTION_BYTES = 4096

Options = Dict[str, Any]


def say(text: str) -> None:
    """One line in the container's log."""
    with contextlib.suppress(OSError):
        os.write(2, f"sandbox-kernel: {text}\n".encode("utf-8", "backslashreplace"))


def read_options(path: str) -> Options:
    """The options, with defaults. Raises OSError or ValueError naming the file."""
    with open(path, encoding="utf-8") as file:
        options = json.load(file)
    if not isinstance(options, dict) or not isinstance(options.get("connection_file"), str):
        raise ValueError(f"{path}: must be a JSON object with 'connection_file'")
    defaults: Options = {
        "imports": [],
        "mask_secrets": True,
        "state_dir": None,
        "artifacts_dir": None,
        "trims": True,
        "env": {},
        "secrets_file": None,
        "cwd": "/session",
    }
    return {**defaults, **options}


def preload(options: Options) -> None:
    """Import what every kernel needs, so that a fork has it already. Exits 78 where there is no ipykernel."""
    package: Any = types.ModuleType(PACKAGE)
    package.__path__ = [HERE]
    not_imported: Dict[str, str] = {}
    package.not_imported = not_imported  # asked for by the host's pool
    sys.modules[PACKAGE] = package
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != HERE]
    trims = importlib.import_module(f"{PACKAGE}.trims")
    if trims.wants(options["trims"], trims.skip_debugger):
        trims.skip_debugger()
    try:
        importlib.import_module("ipykernel.kernelapp")
    except ImportError as exc:
        say(f"this image has no ipykernel that can be imported ({exc}); install it there: pip install ipykernel")
        raise SystemExit(EX_CONFIG) from None
    importlib.import_module(f"{PACKAGE}.hook")
    importlib.import_module(f"{PACKAGE}.application")
    # What ipykernel itself imports only while its application starts.
    lazily = ["ipykernel.debugger", "IPython.core.magics", "IPython.core.completer", "IPython.display"]
    os.environ.setdefault("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    for name in [*lazily, *options["imports"]]:
        try:
            importlib.import_module(name)
        except Exception as exc:
            if name in options["imports"]:
                not_imported[name] = f"{type(exc).__name__}: {exc}"
                say(f"cannot import {name!r} beforehand ({not_imported[name]}); going on without it")
    gc.collect()
    gc.freeze()  # a collection in the child must not touch, and so copy, the pages it shares with us


# --- the family --------------------------------------------------------------------------------


def prctl(option: int, value: int) -> None:
    """Set one attribute of this process (prctl(2))."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        say(f"prctl({option}) failed: {os.strerror(ctypes.get_errno())}")


def descendants() -> List[int]:
    """Processes below this one. As we are their subreaper, none can leave by losing its parent."""
    children: Dict[int, List[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except (OSError, ValueError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry))
    found: List[int] = []
    waiting = [os.getpid()]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def reap(kernel: int) -> Optional[int]:
    """Collect the dead; the wait status of ``kernel`` when it is among them."""
    status = None
    while True:
        try:
            pid, result = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == 0:
            return status
        if pid == kernel:
            status = result


def kill_all() -> None:
    """Kill every process below this one, those that fork while we do it too."""
    deadline = time.monotonic() + KILL_LIMIT_S
    while True:
        family = descendants()
        if not family:
            return
        if time.monotonic() > deadline:
            say(f"{len(family)} processes do not die; going on")
            return
        for pid in family:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        signal.sigtimedwait({signal.SIGCHLD}, 0.02)
        reap(0)


# --- the kernel --------------------------------------------------------------------------------


def remove_stale_sockets(connection: Dict[str, Any]) -> None:
    """Unlink the sockets a dead kernel left, or whatever its code put in their place."""
    if connection.get("transport") != "ipc":
        return
    for channel in ("shell", "iopub", "stdin", "control", "hb"):
        path = f"{connection['ip']}-{connection[f'{channel}_port']}"
        try:
            if stat.S_ISDIR(os.lstat(path).st_mode):
                shutil.rmtree(path)
            else:
                os.unlink(path)
        except FileNotFoundError:
            pass


def copy_connection(options: Options, folder: str) -> str:
    """A private copy of the connection file (ipykernel rewrites it when it has Curve keys); its path.

    Padded and written in place, so that it succeeds on a tmpfs that the kernel before has filled.
    """
    with open(options["connection_file"], "rb") as file:
        data = file.read()
    connection = json.loads(data)
    application = sys.modules["ipykernel.kernelapp"].IPKernelApp
    if connection.get("curve_secretkey") and not hasattr(application, "curve_secretkey"):
        version = getattr(sys.modules["ipykernel"], "__version__", "of this image")
        say(f"ipykernel {version} cannot encrypt with CurveZMQ, as its host expects; upgrade: pip install -U ipykernel")
        raise SystemExit(EX_CONFIG)
    remove_stale_sockets(connection)
    os.makedirs(folder, mode=0o700, exist_ok=True)
    path = os.path.join(folder, "kernel.json")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        os.pwrite(descriptor, data.ljust(CONNECTION_BYTES), 0)
        os.ftruncate(descriptor, max(len(data), CONNECTION_BYTES))
    finally:
        os.close(descriptor)
    return path


def run_kernel(options: Options, connection_file: str) -> None:
    """In the child: become the kernel, and return when it was asked to exit."""
    os.setsid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in HANDLED:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, HANDLED)
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")  # past the memory limit the kernel goes first, so that we can tell of it
    except OSError:
        pass
    os.environ.pop("JPY_PARENT_PID", None)
    os.environ.update({name: str(value) for name, value in options["env"].items()})
    secrets: Dict[str, str] = {}
    if options["secrets_file"]:
        try:
            with open(options["secrets_file"], encoding="utf-8") as file:
                secrets = {name: str(value) for name, value in json.load(file).items()}
            os.environ.update(secrets)
        except (OSError, ValueError, AttributeError) as exc:
            say(f"secrets are missing: cannot read {options['secrets_file']} ({type(exc).__name__})")
    for folder in (options["state_dir"], options["artifacts_dir"]):
        if folder:
            try:
                os.makedirs(folder, exist_ok=True)
            except OSError as exc:
                say(f"cannot make {folder}: {exc.strerror}")
    try:
        os.chdir(options["cwd"])
    except OSError as exc:
        say(f"cannot work in {options['cwd']}: {exc.strerror}; staying in {os.getcwd()}")
    if "numpy" in sys.modules:  # its generator was seeded before the fork: each kernel would draw the same numbers
        sys.modules["numpy"].random.seed()

    from traitlets.config import Config

    config = Config()
    config.IPKernelApp.connection_file = connection_file
    config.IPKernelApp.parent_handle = 1  # no poller of a parent, and no advice about Ctrl-C on stdout
    config.IPKernelApp.extra_extensions = [f"{PACKAGE}.hook"]
    config.SandboxHook = Config({name: options[name] for name in ("state_dir", "mask_secrets", "trims")})
    config.SandboxHook.secrets = list(secrets.values())
    sys.modules[f"{PACKAGE}.trims"].configure(config, options["trims"])
    app = sys.modules[f"{PACKAGE}.application"].KernelApp.instance(config=config, chosen=options["trims"], say=say)
    app.initialize([])
    app.start()
    # A thread of the user's that never ends must not keep a kernel that was asked to exit.
    last = threading.Timer(EXIT_LIMIT_S, os._exit, (0,))
    last.daemon = True
    last.start()


# --- the supervisor ----------------------------------------------------------------------------


def supervise(kernel: int) -> Optional[int]:
    """Wait for what happens next: the supervisor's exit code, or ``None`` when a fresh kernel is wanted."""
    while True:
        number = signal.sigwait(HANDLED)
        if number == signal.SIGHUP:
            kill_all()
            return None
        if number == signal.SIGTERM:
            os.kill(kernel, signal.SIGTERM)
            deadline = time.monotonic() + TERM_GRACE_S
            while reap(kernel) is None and time.monotonic() < deadline:
                signal.sigtimedwait({signal.SIGCHLD}, max(0.0, deadline - time.monotonic()))
            kill_all()
            return 128 + signal.SIGTERM
        if number == signal.SIGINT:
            with contextlib.suppress(OSError):
                os.killpg(kernel, signal.SIGINT)
            continue
        status = reap(kernel)
        if status is None:
            continue
        kill_all()
        if os.WIFSIGNALED(status):
            died = os.WTERMSIG(status)
            say(f"the kernel was killed by signal {died} ({signal.strsignal(died) or 'unknown'})")
            return 128 + died
        code = os.WEXITSTATUS(status)
        say(f"the kernel exited with code {code}")
        return code


def main() -> int:
    """Supervise kernels until one ends by itself."""
    signal.pthread_sigmask(signal.SIG_BLOCK, HANDLED)
    path = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 else os.path.join(HERE, "boot", "options.json")
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    private = tempfile.mkdtemp(prefix="kernel-")
    preloaded = False
    try:
        while True:
            try:
                options = read_options(path)
                if not preloaded:
                    preload(options)
                    preloaded = True
                connection_file = copy_connection(options, private)
            except (OSError, ValueError, KeyError) as exc:
                say(f"cannot start a kernel: {type(exc).__name__}: {exc}")
                return EX_NOINPUT
            with warnings.catch_warnings():
                # numpy's BLAS threads are made ready for a fork by BLAS itself; Python 3.12 warns all the same
                warnings.simplefilter("ignore", DeprecationWarning)
                kernel = os.fork()
            if kernel == 0:
                private = ""
                run_kernel(options, connection_file)
                return 0
            code = supervise(kernel)
            if code is not None:
                return code
    finally:
        if private:
            shutil.rmtree(private, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
