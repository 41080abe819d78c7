"""Settings: where they come from, which goes before which, and what is refused by name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from sandbox_kernel import DatasetAccess, SessionStorage, Settings
from sandbox_kernel.errors import SandboxError, SettingsError

PROMISED = {
    "sessions_root", "store_root", "session_storage", "dataset_access", "datasets_path", "image", "engine", "transport",
    "network", "runtime", "memory_limit", "cpus", "pids_limit", "timeout_s", "interrupt_grace_s", "restart_on_death",
    "idle_timeout_s", "max_output_bytes", "max_artifact_bytes", "pool_size",
}  # fmt: skip
"""Issue 2 fixes these names."""


@pytest.fixture(autouse=True)
def nothing_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("SANDBOX_")]:
        monkeypatch.delenv(name)


def test_the_promised_names_are_there() -> None:
    assert set(Settings.model_fields) >= PROMISED


def test_argument_then_environment_then_file_then_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().cpus == 1.0
    Path(".env").write_text("SANDBOX_CPUS=2\nSANDBOX_MEMORY_LIMIT=3g\n")
    assert Settings().cpus == 2.0
    monkeypatch.setenv("SANDBOX_CPUS", "4")
    assert Settings().cpus == 4.0
    settings = Settings(cpus=5)
    assert (settings.cpus, settings.memory_limit) == (5.0, 3 * 2**30)


def test_what_is_no_text_is_written_in_the_environment_too(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "timeout_s": "None", "network": '["PyPI.org"]', "pool_imports": '["numpy"]', "restart_on_death": "false",
        "dataset_access": "HYBRID", "session_storage": "TMPFS", "datasets_path": "~/data", "idle_timeout_s": "",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"SANDBOX_{name.upper()}", text)
    settings = Settings()
    assert (settings.timeout_s, settings.idle_timeout_s, settings.restart_on_death) == (None, None, False)
    assert (settings.network, settings.pool_imports) == (["pypi.org"], ["numpy"])
    assert (settings.dataset_access, settings.session_storage) == (DatasetAccess.HYBRID, SessionStorage.TMPFS)
    assert settings.datasets_path == Path.home() / "data"


def test_what_others_keep_in_the_file_is_left_alone() -> None:
    Path(".env").write_text("OPENAI_API_KEY=sk-1\nIMAGE=theirs\ncpus=9\nSANDBOX_PIDS_LIMIT=64\n")
    settings = Settings()
    assert (settings.image, settings.cpus, settings.pids_limit) == ("sandbox:latest", 1.0, 64)
    Path("other.env").write_text("SANDBOX_PIDS_LIMIT=65\n")
    assert Settings(_env_file="other.env").pids_limit == 65


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"memory": "1g"}, "unknown setting 'memory'.*Known settings: .*memory_limit"),
        ({"cpus": 0}, "'cpus'.*greater than 0"),
        ({"cpus": float("inf")}, "'cpus'.*finite"),
        ({"memory_limit": "2x"}, "'memory_limit'.*'512m'"),
        ({"memory_limit": float("inf")}, "'memory_limit'.*'512m'"),
        ({"memory_limit": "1m"}, "'memory_limit'.*at least 64m"),
        ({"timeout_s": 0}, "'timeout_s'"),
        ({"timeout_s": float("nan")}, "'timeout_s'"),
        ({"image": ""}, "'image'"),
        ({"runtime": ""}, "'runtime'"),
        ({"engine": "podman"}, "'engine'.*'docker' or 'local'"),
        ({"transport": "udp"}, "'transport'.*'auto', 'ipc' or 'tcp'"),
        ({"network": "pypi.org"}, "'network'.*'none', 'full', or a list"),
        ({"network": ["http://pypi.org/simple"]}, "'network'.*http://pypi.org/simple"),
        ({"network": ["none", "pypi.org"]}, "'network'.*'none' stands alone"),
        ({"tmpfs_size": 1}, "'tmpfs_size'.*at least 1m"),
        ({"pool_imports": ["numpy", "os; exit"]}, "'pool_imports'.*'os; exit' is not the name"),
        ({"sessions_root": "~nobody-of-that-name/s"}, "'sessions_root'.*home"),
        ({"session_storage": "TAPE"}, "'session_storage'.*'BIND' or 'TMPFS'"),
        ({"dataset_access": "LOCAL_RO"}, "dataset_access=LOCAL_RO needs datasets_path"),
        ({"datasets_path": "/data"}, "datasets_path is set, but dataset_access=NONE"),
        ({"engine": "local", "runtime": "runsc"}, "runtime needs a container"),
        ({"engine": "local", "session_storage": "TMPFS"}, "session_storage=TMPFS needs a container"),
        ({"engine": "local", "network": ["pypi.org"]}, "network as a list of hosts needs a container"),
        ({"cpus": -1, "pids_limit": 1}, "(?s)'cpus'.*'pids_limit'"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_is_wrong_is_refused_by_name(given: dict[str, Any], says: str) -> None:
    with pytest.raises(SettingsError, match=says) as caught:
        Settings(**given)
    assert isinstance(caught.value, SandboxError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("SANDBOX_MEMORY", "1g", "unknown setting.*SANDBOX_MEMORY|unknown setting 'sandbox_memory' in .env"),
        ("SANDBOX_CPUS", "many", "'cpus'"),
        ("SANDBOX_POOL_IMPORTS", "numpy", "'pool_imports'.*SANDBOX_POOL_IMPORTS='"),
        ("SANDBOX_NETWORK", "pypi.org", "'network'.*as JSON"),
    ],
)
def test_the_environment_and_the_file_are_checked_as_well(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, says: str
) -> None:
    Path(".env").write_text(f"{name}={text}\n")
    with pytest.raises(SettingsError, match=says):
        Settings()
    Path(".env").unlink()
    monkeypatch.setenv(name, text)
    with pytest.raises(SettingsError, match=says):
        Settings()


def test_a_file_that_is_no_text_is_named() -> None:
    Path(".env").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match=r"\.env cannot be read"):
        Settings()
