"""What the viewer's tests share: the document's own session, and what a terminal would act on."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from viewer import show

DOCUMENT = Path(__file__).parent / "data" / "bind-mode-session-logging.md"
# Everything but the newline.
ACTIVE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def document_files() -> tuple[str, str, str]:
    """The document's examples of session.log, session_metadata.json and python_state.json."""
    log, metadata, state = re.findall(r"```json\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return log, metadata, state


def document_session(root: Path) -> Path:
    """A folder ``conv`` with those files, and one artifact that waits."""
    folder = root / "sessions" / "conv"
    (folder / "artifacts").mkdir(parents=True)
    for name, text in zip(("session.log", "session_metadata.json", "python_state.json"), document_files(), strict=True):
        (folder / name).write_text(text)
    (folder / "artifacts" / "data.csv").write_text("a,b\n")
    return folder


def shown(folder: Path, **options: Any) -> str:
    """What the viewer writes of a folder that it can show."""
    out = io.StringIO()
    assert show(folder, out=out, **options) == 0
    return out.getvalue()
