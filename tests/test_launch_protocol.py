"""jupyter_kernel_test, the protocol's own tests, on a kernel under ``launch.py`` with every trim and the hook on."""

# ruff: noqa: RUF012 - class attributes are how jupyter_kernel_test is told

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jupyter_kernel_test
import pytest
from launched import LAUNCH

pytestmark = pytest.mark.filterwarnings("default")

OPTIONS = (
    """printf '{"connection_file": "%s", "state_dir": "%s", "cwd": "%s"}' "$1" "$0/state" "$0" > "$0/options.json" &&"""
)


@pytest.fixture(scope="module", autouse=True)
def kernelspec() -> Iterator[None]:
    """A kernelspec named ``launched`` that starts the supervisor for a plain Jupyter client."""
    with tempfile.TemporaryDirectory(prefix="kt-") as folder, pytest.MonkeyPatch.context() as patch:
        place = Path(folder, "kernels", "launched")
        place.mkdir(parents=True)
        python = os.environ.get("KERNEL_PYTHON", sys.executable)
        command = f'{OPTIONS} exec {python} {LAUNCH} "$0/options.json"'
        spec = {
            "argv": ["sh", "-c", command, folder, "{connection_file}"],
            "display_name": "launched",
            "language": "python",
        }
        (place / "kernel.json").write_text(json.dumps(spec))
        patch.setenv("JUPYTER_PATH", folder)
        yield


class TestProtocol(jupyter_kernel_test.KernelTests):  # type: ignore[misc, unused-ignore]
    kernel_name = "launched"
    language_name = "python"
    file_extension = ".py"
    code_hello_world = "print('hello, world')"
    code_stderr = "import sys; print('oops', file=sys.stderr)"
    completion_samples = [{"text": "zi", "matches": {"zip"}}]
    complete_code_samples = ["1", "print('hello, world')", "def f(x):\n  return x*2\n\n"]
    incomplete_code_samples = ["print('''hello", "def f(x):\n  x*2"]
    invalid_code_samples = ["import = 7q"]
    code_page_something = "zip?"
    code_generate_error = "raise ValueError('wrong')"
    code_execute_result = [{"code": "6*7", "result": "42"}, {"code": "'a' * 3", "result": "'aaa'"}]
    code_display_data = [
        {"code": "from IPython.display import HTML, display; display(HTML('<b>x</b>'))", "mime": "text/html"}
    ]
    code_history_pattern = "6*"
    supported_history_operations = ("tail", "search")  # a range of its own session IPython calls 0
    code_inspect_sample = "zip"
    code_clear_output = "from IPython.display import clear_output; clear_output()"
