"""What ``make bench`` says of what it could not measure."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gateway, report
from benchmarks.gateway import gateway_image
from benchmarks.measure import Bench
from benchmarks.rivals import RIVALS, ROWS, rivals
from sandbox_kernel.errors import EngineError


async def test_a_rival_that_is_not_installed_has_rows_that_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("llm_sandbox", "autogen_core", "smolagents"):
        monkeypatch.setitem(sys.modules, module, None)  # an import fails as where it is not installed
    found = await rivals(Bench(1, 1, True, tmp_path, "sandbox:latest"))
    assert [(one.row, one.baseline_name) for one in found] == [(row, name) for name in RIVALS for row in ROWS]
    assert all("pip install 'sandbox-kernel[rivals]'" in one.note for one in found)
    assert [(one.ratio, one.met) for one in found] == [(None, None)] * len(found)
    table = report.write(found, {}, tmp_path / "results").read_text()
    for name in RIVALS:
        assert f"| pass | – | – | 0 | {name} | – | – | – | left out |" in table
        assert f"- pass: {name}: " in table
    written = json.loads((tmp_path / "results" / "results.json").read_text())["measurements"]
    assert [one["median"] for one in written] == [None] * len(found)


def test_without_a_registry_the_gateway_image_fails_by_name(image: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "TAG", "sandbox-test:gateway")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    with pytest.raises(EngineError, match="jupyter_kernel_gateway"):
        gateway_image(image)
