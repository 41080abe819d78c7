"""The trims change what a cell costs, never what it does."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from IPython.core.compilerop import CachingCompiler
from IPython.core.inputtransformer2 import TransformerManager
from IPython.core.interactiveshell import InteractiveShell
from launched import Launched, launched

from sandbox_kernel.kernel_side import trims

CELLS = [
    "x = 1\nx",
    "%time x = 1",
    "x = %env HOME",
    "x = !echo hi",
    "x = (1\n%2)",
    "if 1:\n    %time 1\n    !ls\n",
    "x?",
    "?x",
    "x = 5 \\\n% 3",
    "'\\d'",
    "await asyncio.sleep(0)",
    "async with a: pass",
    "[i async for i in a]",
    "  indented = 1\n  y = 2",
    ">>> x = 1",
    "%%time\nx = 1",
    ",f a b",
    "/f a",
    "def f(:",
    "x = '''%time\n!ls'''",
    "(" * 200,
    "",
    "\n\n",
    "a = 1; b = 2 # await",
]


STATEMENTS = [
    "a = 1\nb = 2\na + b",
    "a = 1\nb = 2\nprint(a)",
    "a = 1; b = 2; a + b;",
    "print('before')\nx = 1\n1 / 0\nprint('never')",
    "\n".join(f"v{n} = {n}" for n in range(30)) + "\nv1 / v0\nprint('never')\nx = 1",
    "print('before')\nx = 1\nreturn 3\nprint('never')",
    "for n in range(3):\n    x = n\nelse:\n    y = 9\nbreak\nx, y",
    "x = 1\nfrom __future__ import annotations\ndef f(a: nothing): ...\nf.__annotations__",
    "def f(a: unknown): ...\nx = 1\nf.__annotations__",
    "def f():\n    return g()\ndef g():\n    raise ValueError('deep')\nx = 1\nf()",
    "import os\nimport sys\nx = os.sep\ny = sys.maxsize\nx",
    "x = 3\nimport math\ny = 4\nprint(math.floor(2.5))\nx + y",
    "from math import *\nx = 1\ny = sqrt(4)\ny",
    "y = 1\nx = 2\nimport no_such_module\nprint('never')",
    "'a text'\n'another'\nx = 1\n'shown'",
    "import asyncio\nx = 1\nawait asyncio.sleep(0)\ny = x + 1\ny",
    "x = [await asyncio.sleep(0, n) async for n in numbers()]\ny = 1\nz = 2",
    "x = 1\ny = 2\nassert x == y, 'not so'\nx",
    "x = 1\ny = x is 1\nz = 3\ny",
    "class A:\n    b: int = 1\nc: int = 2\nA.b, c, __annotations__",
    "%time x = 1\ny = 2\nx + y",
    "x = !echo hi\ny = 1\nx",
    "x = 1\nraise KeyboardInterrupt\ny = 2",
    "import sys\nx = 1\nsys.exit(3)\ny = 2",
    "x = 1\ndel x\ny = 2\nx",
    "try:\n    x = 1 / 0\nexcept ZeroDivisionError as exc:\n    y = exc\nz = 2\ny",
    "x = 1\nlambda: (yield)\ny = 2\n[x for x in range(3)]",
    "x = 1\nnonlocal x\ny = 2\nz = 3",
    "import traceback\ndef f(): 1 / 0\ntry:\n    f()\nexcept Exception:\n    traceback.print_exc()\nx = 1",
    "get_ipython().ast_node_interactivity = 'all'",
    "1\n2\nx = 3\nx",
    "get_ipython().ast_node_interactivity = 'last_expr_or_assign'",
    "1\n2\nx = 3\ny = 4",
    "get_ipython().ast_node_interactivity = 'last_expr'",
    "x = 1\nprint(x)\ny = 2\n_",
]


@pytest.fixture(scope="module")
def kernel() -> Iterator[Launched]:
    with launched() as one:
        yield one


class Shell:
    """As much of a shell as one trim asks for."""

    def __init__(self) -> None:
        self.input_transformer_manager = TransformerManager()
        self.compile = CachingCompiler()
        self.autoawait = True
        self.should_run_async = lambda raw, **kwargs: InteractiveShell.should_run_async(self, raw, **kwargs)


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_transformed_as_ever(cell: str) -> None:
    shell = Shell()
    trims.leave_python_alone(shell, None)
    assert shell.input_transformer_manager.transform_cell(cell) == TransformerManager().transform_cell(cell)


def test_a_tree_is_given_once_and_only_for_what_was_parsed() -> None:
    shell, cell = Shell(), "x = 1\ny = [x]\n"
    trims.leave_python_alone(shell, None)
    shell.input_transformer_manager.transform_cell(cell)
    other = shell.compile.ast_parse("x = 2\n", filename="f")
    shell.input_transformer_manager.transform_cell(cell)
    trees = [shell.compile.ast_parse(cell, filename="f") for _ in range(2)]
    assert trees[0] is not trees[1]
    assert ast.dump(other) == ast.dump(ast.parse("x = 2\n"))
    assert {ast.dump(tree, include_attributes=True) for tree in trees} == {
        ast.dump(ast.parse(cell), include_attributes=True)
    }


@pytest.mark.parametrize("cell", CELLS)
def test_a_cell_is_async_as_ever(cell: str) -> None:
    shell = Shell()
    usual, transformed = shell.should_run_async, TransformerManager().transform_cell(cell)
    trims.see_async_by_its_words(shell, None)
    assert shell.should_run_async(cell, transformed_cell=transformed) == usual(cell, transformed_cell=transformed)


def test_transformers_of_the_user_still_run(kernel: Launched) -> None:
    kernel.run(
        "seen = []\n"
        "from IPython.core.inputtransformer2 import TokenTransformBase\n"
        "class Watch(TokenTransformBase):\n"
        "    @classmethod\n"
        "    def find(cls, tokens): seen.append(1)\n"
        "m = get_ipython().input_transformer_manager\n"
        "m.token_transformers.append(Watch)\n"
        "get_ipython().input_transformers_post.append(lambda lines: [l.replace('HERE', '42') for l in lines])"
    )
    assert kernel.printed("print(HERE, len(seen))") == "42 1\n"
    kernel.run("m.token_transformers.pop(); get_ipython().input_transformers_post.pop()")


def test_every_trim_fits_this_ipykernel(kernel: Launched) -> None:
    assert "left out" not in kernel.log


def test_a_trim_that_no_longer_fits_is_left_out_and_said() -> None:
    said: list[str] = []
    trims.apply(object(), object(), ["transform_once", "leave_python_alone"], said.append)
    assert [line.split(",")[0] for line in said] == ["trim transform_once left out", "trim leave_python_alone left out"]


def test_messages_are_packed_as_ever(kernel: Launched) -> None:
    # What is no JSON, a lone surrogate, a request's header that repeats; and ids that tell one request from the next.
    text = kernel.printed(
        "k = get_ipython().kernel\n"
        "from jupyter_client.session import json_packer\n"
        "import datetime, warnings; warnings.simplefilter('ignore')\n"
        "when = datetime.datetime(2026, 1, 1)\n"
        "odd = [{'a': {1}}, {'d': when}, {1: 'é', 'x': float('inf')}, 'text', {}]\n"
        "print([k.session.pack(o) == json_packer(o) for o in odd])"
    )
    assert text == "[True, True, True, True, True]\n"
    parents = {message["parent_header"]["msg_id"] for _ in range(3) for message in kernel.run("1")[1]}
    assert len(parents) == 3


def told(kernel: Launched, code: str) -> list[Any]:
    """What a client hears of a cell, without what differs from kernel to kernel."""
    reply, messages = kernel.run(code)
    content = [reply["content"], *(one["content"] for one in messages if one["msg_type"] not in ("status", "stream"))]
    streams = {"stdout": "", "stderr": ""}
    for one in messages:
        if one["msg_type"] == "stream":
            streams[one["content"]["name"]] += one["content"]["text"]
    # Each compilation warns anew; those that only look at the cell do not know its name.
    streams["stderr"] = re.sub(r"<>:\d+: SyntaxWarning: .*\n", "", streams["stderr"])
    text = json.dumps([streams, *content], sort_keys=True, ensure_ascii=False)
    own = r"(/tmp/ipykernel_\d+/)?\d+\.py|0x[0-9a-f]+|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|[\d.]+ [nμµ]?s\b"
    told: list[Any] = json.loads(re.sub(own, "-", text))
    return told


def test_cells_do_and_show_what_they_do_in_a_stock_kernel() -> None:
    names = "sorted(name for name in globals() if len(name) < 4)"
    with launched() as trimmed, launched(trims=False) as stock:
        for cell in STATEMENTS:
            for code in (cell, names):
                assert told(trimmed, code) == told(stock, code), cell


def test_statements_run_together_and_imports_apart(kernel: Launched) -> None:
    kernel.run(
        "def counted(code, *args, **kwargs):\n"
        "    pieces.append(code.co_firstlineno)\n"
        "    return run(code, *args, **kwargs)\n"
        "pieces, run = [], get_ipython().run_code\nget_ipython().run_code = counted"
    )
    kernel.run("a = 1\nb = 2\nimport os\nimport sys\nc = 3\nd = 4\npieces.append('here')\nd")
    assert kernel.printed("get_ipython().run_code = run\nprint(len(pieces) - 1, pieces.index('here'))") == "5 3\n"


def test_an_unsigned_request_is_not_run(kernel: Launched) -> None:
    session = kernel.client.session
    key, session.key = session.key, b"another"
    kernel.client.execute("forged = True")
    session.key = key
    assert kernel.printed("print('forged' in dir())") == "False\n"


def test_no_subshells_are_promised(kernel: Launched) -> None:
    kernel.client.kernel_info()
    info = kernel.client.get_shell_msg(timeout=10)["content"]
    assert "kernel subshells" not in info.get("supported_features", [])


@pytest.mark.parametrize("waits", ["import time; time.sleep(0.2)", "import asyncio; await asyncio.sleep(0.2)"])
def test_a_failing_cell_aborts_those_that_wait_and_no_others(kernel: Launched, waits: str) -> None:
    client = kernel.client
    sent = [client.execute(f"{waits}; 1 / 0"), *(client.execute("pass") for _ in range(5))]

    def statuses() -> list[str]:
        found: dict[str, str] = {}
        while len(found) < len(sent):
            reply = client.get_shell_msg(timeout=10)
            found[reply["parent_header"]["msg_id"]] = reply["content"]["status"]
        return [found[msg_id] for msg_id in sent]

    assert statuses() == ["error"] + ["aborted"] * 5
    sent = [client.execute("pass")]
    assert statuses() == ["ok"]


def test_an_interrupt_while_the_queue_is_aborted_leaves_the_kernel_as_it_was(kernel: Launched) -> None:
    kernel.run(
        "import os, signal, sys\n"
        "stream = get_ipython().kernel.shell_stream\n"
        "flush = stream.flush\n"
        "def interrupted(*args):\n"
        "    if sys._getframe(1).f_code.co_name == '_abort_queues':\n"
        "        del stream.flush\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "    return flush(*args)\n"
        "stream.flush = interrupted"
    )
    assert kernel.run("1 / 0")[0]["content"]["ename"] == "ZeroDivisionError"
    assert kernel.printed("print('flush' in vars(stream))") == "False\n"


def test_an_ipykernel_that_uses_its_shell_thread_elsewhere_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from ipykernel.kernelbase import Kernel

    from sandbox_kernel.kernel_side import application

    app, said = SimpleNamespace(shell_channel_thread="its own"), []
    monkeypatch.setattr(Kernel, "do_shutdown", lambda self: self.shell_channel_thread.name)
    trims.attempt(application.in_one_thread, True, said.append, app)
    assert app.shell_channel_thread == "its own"
    assert "in_one_thread left out" in said[0]
    assert "do_shutdown" in said[0]
    monkeypatch.undo()
    trims.attempt(application.in_one_thread, True, said.append, app)
    assert not app.shell_channel_thread
    assert len(said) == 1


def test_output_is_complete_when_the_cell_ends(kernel: Launched) -> None:
    for _ in range(20):
        text = kernel.printed("import os, sys\nprint('a', end='')\nos.system('printf b')\nprint('c', end='')\nNone")
        assert sorted(text) == ["a", "b", "c"]


@pytest.mark.parametrize("known", [True, False])
def test_prints_are_as_ever(kernel: Launched, known: bool) -> None:
    """Also where ipykernel's stream has moved, and is left to itself."""
    kernel.run(f"import sys, threading\nstreams = sys.modules[type(sys.stdout).__module__]\nstreams._KNOWN = {known}")
    try:
        _, messages = kernel.run(
            "class Text(str): pass\n"
            "sizes = [sys.stdout.write(text) for text in ('a', '', 'é\\ud800', Text('b'), 'c' * 600_000)]\n"
            "print('on stderr', file=sys.stderr)\n"
            "threads = [threading.Thread(target=print, args=('d' * 100,)) for _ in range(20)]\n"
            "[thread.start() for thread in threads]; [thread.join() for thread in threads]\n"
            "try: sys.stdout.write(b'e')\n"
            "except TypeError: print('no text')"
        )
        streams = [one["content"] for one in messages if one["msg_type"] == "stream"]
        text = "".join(one["text"] for one in streams if one["name"] == "stdout")
        assert text.startswith("aé\\ud800b" + "c" * 600_000)
        assert sorted(text[600_009:]) == sorted("d" * 2000 + "\n" * 21 + "no text")
        assert [one["text"] for one in streams if one["name"] == "stderr"] == ["on stderr\n"]
        assert kernel.printed("print(sizes)") == "[1, 0, 7, 1, 600000]\n"
    finally:
        kernel.run("streams._KNOWN = True")


def test_a_forked_child_prints_and_flushes(kernel: Launched) -> None:
    text = kernel.printed(
        "import os, sys, threading\n"
        "for _ in range(20):\n"
        "    if not (child := os.fork()):\n"
        "        print('child', flush=True)\n"
        "        os._exit(0)\n"
        "    os.waitpid(child, 0)\n"
        "print('parent')"
    )
    assert "parent" in text


def test_outputs_are_not_hoarded(kernel: Launched) -> None:
    def resident() -> int:
        return int(kernel.printed("print(open('/proc/self/statm').read().split()[1])")) * 4096

    def print_50_mb() -> None:
        for _ in range(5):
            kernel.run("for _ in range(100):\n    print('x' * 100_000)")

    print_50_mb()
    before = resident()
    print_50_mb()
    print_50_mb()
    assert resident() - before < 50_000_000
    assert kernel.printed("print(len(getattr(get_ipython().history_manager, 'outputs', [])))") == "0\n"


def test_history_and_warnings_are_as_ever(kernel: Launched) -> None:
    kernel.run("marker = 'find me'")
    kernel.client.history(hist_access_type="tail", n=1)
    assert kernel.client.get_shell_msg(timeout=10)["content"]["history"][0][2] == "marker = 'find me'"
    _, messages = kernel.run("'\\d'")
    warned = "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")
    assert warned.count("invalid escape") <= 1


def test_magics_and_awaits_work(kernel: Launched) -> None:
    assert "hi" in kernel.printed("import asyncio\nx = !echo hi\nprint(await asyncio.sleep(0, x[0]))")
    assert "Wall time" in kernel.printed("%time None")
