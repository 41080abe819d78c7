"""SECURITY.md promises nothing that has no test, and no attack is left out of it."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`(tests/test_\w+\.py)::(test_\w+)`")


def rows() -> list[tuple[str, str]]:
    """Promise and tests of each row of the table."""
    text = (ROOT / "SECURITY.md").read_text()
    table = text[text.index("| promise | test |") :].split("\n\n", 1)[0].splitlines()[2:]
    return [(cells[0].strip(), cells[1].strip()) for cells in (line.strip("|").split("|") for line in table)]


def test_every_promise_names_tests_that_exist() -> None:
    promises = [(promise, tests) for promise, tests in rows() if not promise.startswith("**")]
    assert len(promises) > 40
    for promise, tests in promises:
        named = NAMED.findall(tests)
        assert named, f"no test for: {promise}"
        for file, name in named:
            defined = re.search(rf"^ *(?:async )?def {name}\(", (ROOT / file).read_text(), re.MULTILINE)
            assert defined, f"{promise}: {file} has no {name}"


def test_every_attack_stands_in_the_table() -> None:
    named = {f"{file}::{name}" for _, tests in rows() for file, name in NAMED.findall(tests)}
    for path in sorted((ROOT / "tests").glob("test_containment*.py")):
        for name in re.findall(r"^ *(?:async )?def (test_\w+)\(", path.read_text(), re.MULTILINE):
            assert f"tests/{path.name}::{name}" in named
