"""What an ipykernel does at each cell that nobody here uses, left out one by one.

Each trim looks exactly for what it changes, and leaves stock behaviour with one line in the container's log where
ipykernel or IPython have moved. Each says what it saves alone (``benchmarks/kernel_trims.py``: time to reply AND idle,
ratio to stock ipykernel 7.4 over ipc, for ``pass`` or for 100 lines). All together: 0.45 for ``pass``, 0.24 for 100
lines, 0.50 for 1,000 prints; with the hook 0.50, 0.28 and 0.53. Where no figure stands, what it saves alone is 1 to
3 %, within the noise of a run.
"""

import ast
import contextlib
import functools
import inspect
import itertools
import json
import sys
import threading
import zlib
from collections import deque
from typing import Any, Callable, Dict, Iterator, List, Tuple, Union

Chosen = Union[bool, List[str]]
"""Option ``trims``: all, none, or those named (to measure one)."""


def wants(chosen: Chosen, trim: Callable[..., None]) -> bool:
    return chosen is True or (isinstance(chosen, list) and trim.__name__ in chosen)


# --- before the kernel starts ------------------------------------------------------------------


def skip_debugger() -> None:
    """Let ipykernel find no debugpy: 80 ms of imports and 9 MB. A cell can still import debugpy itself."""
    if "debugpy" in sys.modules or "ipykernel.debugger" in sys.modules:
        return
    sys.modules["debugpy"] = None  # type: ignore[assignment]
    try:
        import ipykernel.debugger  # noqa: F401
    except Exception:  # an ipykernel without that module needs no trim
        pass
    finally:
        del sys.modules["debugpy"]


def memory_history(config: Any) -> None:
    """Keep the history in memory, not in a file on disk written by a thread of its own. ``pass``: 0.82."""
    config.HistoryManager.hist_file = ":memory:"


def no_sleep(config: Any) -> None:
    """Do not sleep 0.5 ms before each reply: our reader waits for idle and needs no delay. ``pass``: 0.88 to 1.0."""
    config.Kernel._execute_sleep = 0.0


def quiet_streams(config: Any) -> None:
    """Flush only when something is buffered: four flushes a cell, two hops each. ``pass``: 0.79 to 0.95."""
    config.IPKernelApp.outstream_class = f"{__package__}.streams.QuietStream"


CONFIGURED = (memory_history, no_sleep, quiet_streams)


def configure(config: Any, chosen: Chosen) -> None:
    """Apply the trims that are configuration; called before the application is made."""
    for trim in CONFIGURED:
        if wants(chosen, trim):
            trim(config)


# --- when the kernel is made -------------------------------------------------------------------


def transform_once(shell: Any, kernel: Any) -> None:
    """ipykernel transforms a cell to see whether it awaits, then IPython does again: keep one. 100 lines: 0.75."""
    transform = shell.transform_cell
    last = [None, None]

    def transform_cell(raw: str) -> Any:
        if last[0] is raw:
            result, last[:] = last[1], [None, None]
            return result
        result = transform(raw)
        last[:] = [raw, result]  # type: ignore[list-item]
        return result

    shell.transform_cell = transform_cell


def leave_python_alone(shell: Any, kernel: Any) -> None:
    """IPython tokenizes each cell in Python to find magics; a cell that parses as Python has none. And the syntax tree
    of that is the one it asks for next. 100 lines: 0.75.

    Magics, ``!`` and ``?`` are no Python wherever IPython looks for them. A cell with a backslash takes the usual way:
    parsing it could warn of an invalid escape, which the compiler will do once more.
    """
    manager, compiler = shell.input_transformer_manager, shell.compile
    transform, stock = manager.do_token_transforms, list(manager.token_transformers)
    parse = compiler.ast_parse
    parsed: List[Any] = [None, 0, None]

    def do_token_transforms(lines: List[str]) -> List[str]:
        source = "".join(lines)
        if "\\" not in source and manager.token_transformers == stock:
            flags = compiler.flags | ast.PyCF_ONLY_AST
            try:
                parsed[:] = source, flags, compile(source, "<cell>", "exec", flags, True)
                return lines
            except (SyntaxError, ValueError, MemoryError, RecursionError):
                pass
        result: List[str] = transform(lines)
        return result

    def ast_parse(source: str, filename: str = "<unknown>", symbol: str = "exec") -> Any:
        known = symbol == "exec" and source == parsed[0] and compiler.flags | ast.PyCF_ONLY_AST == parsed[1]
        tree, parsed[:] = parsed[2], (None, 0, None)  # whoever gets a tree may change it
        return tree if known else parse(source, filename, symbol)

    manager.do_token_transforms = do_token_transforms
    compiler.ast_parse = ast_parse


def compile_at_once(shell: Any, kernel: Any) -> None:
    """IPython compiles and runs each statement of a cell alone: do so with all those between imports. 100 lines: 0.86.

    Only the last expression is to be displayed. What does not compile together takes the usual way, in which the
    statements before the faulty one run. Imports are apart, as those who watch them watch a whole piece of code.
    """
    run = shell.run_ast_nodes
    if tuple(inspect.signature(run).parameters) != ("nodelist", "cell_name", "interactivity", "compiler", "result"):
        raise TypeError("run_ast_nodes")

    def together(nodes: List[ast.stmt], cell_name: str, compiler: Any) -> Any:
        flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT if shell.autoawait else 0
        try:
            with compiler.extra_flags(flags):
                code = compiler(ast.Module(nodes, []), cell_name, "exec")
        except (SyntaxError, ValueError, MemoryError, RecursionError, OverflowError):
            return None
        return None if code.co_flags & inspect.CO_COROUTINE else code

    async def run_ast_nodes(
        nodelist: List[ast.stmt],
        cell_name: str,
        interactivity: str = "last_expr",
        compiler: Any = compile,
        result: Any = None,
    ) -> Any:
        if len(nodelist) < 3 or interactivity not in ("last_expr", "none") or not hasattr(compiler, "extra_flags"):
            return await run(nodelist, cell_name, interactivity, compiler, result)
        shown = nodelist[-1:] if interactivity == "last_expr" and isinstance(nodelist[-1], ast.Expr) else []
        for _, piece in itertools.groupby(nodelist[: len(nodelist) - len(shown)], _is_import):
            nodes = list(piece)
            code = together(nodes, cell_name, compiler) if len(nodes) > 1 else None
            if code is None:
                failed = await run(nodes, cell_name, "none", compiler, result)
            else:
                failed = await shell.run_code(code, result)
            if failed:
                return True
        return await run(shown, cell_name, interactivity, compiler, result) if shown else False

    shell.run_ast_nodes = run_ast_nodes


def _is_import(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def see_async_by_its_words(shell: Any, kernel: Any) -> None:
    """Twice a cell IPython compiles it to learn whether it awaits; without the words it cannot. 100 lines: 0.78."""
    should_run_async = shell.should_run_async

    def quickly(raw_cell: str, **kwargs: Any) -> Any:
        cell = kwargs.get("transformed_cell") or raw_cell
        if "await" not in cell and "async" not in cell:
            return False
        return should_run_async(raw_cell, **kwargs)

    shell.should_run_async = quickly


def name_cells_faster(shell: Any, kernel: Any) -> None:
    """A cell's file name is a hash of its code in pure Python, for the debugger: use zlib's. 0.5 ms of 100 lines."""
    import ipykernel.compiler

    if not callable(ipykernel.compiler.murmur2_x86):
        raise AttributeError("ipykernel.compiler.murmur2_x86")
    ipykernel.compiler.murmur2_x86 = lambda data, seed: zlib.crc32(data.encode("utf-8", "surrogatepass"), seed)


def keep_no_outputs(shell: Any, kernel: Any) -> None:
    """IPython keeps every output in ``history_manager.outputs``: after 200 MB of prints, 382 MB. 1,000 prints: 0.78."""
    outputs = getattr(shell.history_manager, "outputs", None)
    if outputs is None:  # an IPython before 9.0: nothing is kept
        return
    if hasattr(shell, "_tee"):

        @contextlib.contextmanager
        def tee(channel: str) -> Iterator[None]:
            yield

        shell._tee = tee
    shell.events.register("post_run_cell", lambda result: outputs.clear())


def busy_with_input(shell: Any, kernel: Any) -> None:
    """Wake the thread that sends once for ``busy`` and ``execute_input``, which follows at once, not for each."""
    thread, main = kernel.iopub_thread, threading.get_ident()
    schedule, publish, events = thread.schedule, kernel._publish_status, thread._events
    if not isinstance(events, deque):
        raise TypeError("the queue of the thread that sends")

    def publish_status(status: str, channel: str, parent: Any = None) -> None:
        if status == "busy" and channel == "shell" and threading.get_ident() == main and _shows(kernel):
            thread.schedule = events.append
            try:
                publish(status, channel, parent)
            finally:
                thread.schedule = schedule
        else:
            publish(status, channel, parent)

    kernel._publish_status = publish_status


def _shows(kernel: Any) -> bool:
    """Whether the request at hand is a cell that will be shown: its ``execute_input`` comes next, or it is aborted."""
    parent = kernel.get_parent("shell")
    content = parent.get("content")
    return parent["msg_type"] == "execute_request" and isinstance(content, dict) and not content.get("silent")


def pack_at_once(shell: Any, kernel: Any) -> None:
    """Each of a cell's 16 parts of messages is packed by a JSON encoder made for it: keep one. And each message repeats
    its request's header: keep its text.
    """
    from jupyter_client.jsonutil import json_default
    from jupyter_client.session import json_packer

    if kernel.session.pack is not json_packer:
        raise TypeError("the packer")
    text = json.encoder.encode_basestring
    encode = json.encoder.c_make_encoder(  # type: ignore[attr-defined]
        None, json_default, text, None, ": ", ", ", False, False, False
    )

    last: List[Any] = [None, b""]

    def pack(value: Any) -> bytes:
        if value is last[0]:
            return bytes(last[1])
        try:
            packed = "".join(encode(value, 0)).encode("utf-8", "surrogateescape")
        except (TypeError, ValueError, RecursionError):  # what is no JSON it mends, or says why
            return bytes(json_packer(value))
        if type(value) is dict and value.get("msg_type") == "execute_request":
            last[:] = [value, packed]
        return packed

    sample = {"a": [1, None, "\xe9\n"], "b": {"c": 1.5}}
    if pack(sample) != json_packer(sample):
        raise ValueError("the encoder of json")
    kernel.session.pack = pack


def log_no_details(shell: Any, kernel: Any) -> None:
    """Four records of DEBUG are made for each cell, with all of its messages, that no handler takes. ``pass``: 0.93."""
    kernel.log.setLevel(max(kernel.log.level, min(handler.level for handler in kernel.log.handlers)))


def remember_signatures(shell: Any, kernel: Any) -> None:
    """At each cell ipykernel looks up which parameters ``run_cell`` takes: remember them. ``pass``: 0.96."""
    import ipykernel.ipkernel

    look = ipykernel.ipkernel._accepts_parameters

    @functools.lru_cache(maxsize=64)
    def remembered(function: Any, names: Tuple[str, ...]) -> Dict[str, Any]:
        found: Dict[str, Any] = look(function, names)
        return found

    def accepts_parameters(method: Any, names: List[str]) -> Dict[str, Any]:
        return remembered(getattr(method, "__func__", method), tuple(names))

    ipykernel.ipkernel._accepts_parameters = accepts_parameters


PATCHED = (
    busy_with_input,
    pack_at_once,
    log_no_details,
    remember_signatures,
    transform_once,
    leave_python_alone,
    compile_at_once,
    see_async_by_its_words,
    name_cells_faster,
    keep_no_outputs,
)


def apply(shell: Any, kernel: Any, chosen: Chosen, say: Callable[[str], None]) -> None:
    """Apply the trims to a kernel that is being made; called by the hook."""
    for trim in PATCHED:
        attempt(trim, chosen, say, shell, kernel)


def attempt(trim: Callable[..., None], chosen: Chosen, say: Callable[[str], None], *where: Any) -> None:
    """Apply one, or ``say`` why not."""
    if wants(chosen, trim):
        try:
            trim(*where)
        except (AttributeError, ImportError, TypeError, ValueError) as exc:
            say(f"trim {trim.__name__} left out, ipykernel has moved: {exc}")
