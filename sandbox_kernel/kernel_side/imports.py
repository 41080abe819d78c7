"""Which modules the session's own code imported, as opposed to the hundreds in ``sys.modules``.

From Python 3.12 on, exactly: ``sys.monitoring`` reports each import instruction of a cell's code, and of the functions
in it, the first time it runs (and never again, so it costs nothing afterwards); one that failed has left no module.

Before 3.12 from evidence: the cell's syntax tree names what might be imported; an import counts when the cell cannot
have ended without running it, when the name it binds is bound to it, or when its module has appeared since. A function
that imports a module which was loaded before cannot be seen there.

In both: modules bound to a name in the namespace, however they came there.
"""

import ast
import dis
import sys
import types
from typing import Any, Dict, Iterator, List, Optional, Set, Tuple

KEPT = 1_000
"""Names kept."""

IMPORT_NAME, LOAD_CONST, EXTENDED_ARG = (dis.opmap[name] for name in ("IMPORT_NAME", "LOAD_CONST", "EXTENDED_ARG"))

Statement = Tuple[str, Tuple[str, ...]]
"""A module's name, and the names taken ``from`` it."""


def argument(code: bytes, at: int) -> int:
    """The operand of the instruction at ``at``, with its prefixes."""
    value, shift, before = code[at + 1], 8, at - 2
    while before >= 0 and code[before] == EXTENDED_ARG:
        value |= code[before + 1] << shift
        shift, before = shift + 8, before - 2
    return value


def imports_of(code: types.CodeType) -> Dict[int, Statement]:
    """The import statements of one code object (not of those inside it) by the offset of their instruction."""
    found: Dict[int, Statement] = {}
    data = code.co_code
    at = data.find(IMPORT_NAME)
    while at >= 0:
        if at % 2 == 0:
            name = code.co_names[argument(data, at)]
            start = at
            while start >= 2 and data[start - 2] == EXTENDED_ARG:
                start -= 2
            taken = code.co_consts[argument(data, start - 2)] if start >= 2 and data[start - 2] == LOAD_CONST else None
            found[at] = (name, taken if type(taken) is tuple else ())
        at = data.find(IMPORT_NAME, at + 1)
    return found


def codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and all that are inside it."""
    waiting = [code]
    while waiting:
        code = waiting.pop()
        yield code
        waiting += [item for item in code.co_consts if type(item) is types.CodeType]


class Imports:
    """Collects the names. ``before`` runs ahead of each piece of a cell, ``after`` once the cell has ended."""

    def __init__(self) -> None:
        self._names: Dict[str, None] = {}
        self._ran: List[Statement] = []
        self._watched: Dict[types.CodeType, Dict[int, Statement]] = {}
        self._once: List[types.CodeType] = []  # code of a cell itself, which never runs again
        self._tool = self._claim_tool()
        self._possible: List[Statement] = []  # inside functions, before 3.12
        self._loaded: Set[str] = set(sys.modules)

    @staticmethod
    def _claim_tool() -> Optional[int]:
        monitoring = getattr(sys, "monitoring", None)
        if monitoring is not None:
            for tool in (4, 3):
                if monitoring.get_tool(tool) is None:
                    monitoring.use_tool_id(tool, "sandbox-kernel imports")
                    return tool
        return None

    # --- exactly -------------------------------------------------------------------------------

    def before(self, code: Any) -> None:
        """Watch the imports of one piece of a cell."""
        if self._tool is None or type(code) is not types.CodeType:
            return
        monitoring = sys.monitoring  # type: ignore[attr-defined, unused-ignore]
        event = monitoring.events.INSTRUCTION
        for part in codes(code):
            statements = imports_of(part)
            if statements:
                if not self._watched:
                    monitoring.register_callback(self._tool, event, self._on_instruction)
                self._watched[part] = statements
                if part is code:
                    self._once.append(part)
                monitoring.set_local_events(self._tool, part, event)

    def _on_instruction(self, code: types.CodeType, offset: int) -> Any:
        statement = self._watched.get(code, {}).get(offset)
        if statement is not None:
            self._ran.append(statement)
        return sys.monitoring.DISABLE  # type: ignore[attr-defined, unused-ignore]

    # --- from evidence -------------------------------------------------------------------------

    def _from_evidence(self, source: str, failed_at: Optional[int], namespace: Dict[str, Any]) -> None:
        """``failed_at``: the line of the cell that raised; 0 when it is not known; ``None``: the cell succeeded."""
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
        waiting: List[Tuple[ast.AST, bool, bool]] = [(tree, True, False)]  # node, certain to run, in a function
        while waiting:
            node, certain, inside = waiting.pop()
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for statement, bound in _statements(node):
                    if inside:
                        if statement[0] not in self._loaded:
                            self._possible.append(statement)
                    elif (certain and (failed_at is None or (node.end_lineno or node.lineno) < failed_at)) or (
                        statement[0] not in self._loaded or _is_bound(statement, bound, namespace)
                    ):
                        self._ran.append(statement)
                continue
            deeper = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            straight = certain and isinstance(node, (ast.Module, ast.With, ast.AsyncWith, ast.ClassDef))
            below = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
            waiting += [(child, straight, deeper) for child in below]
            for block in [*getattr(node, "handlers", []), *getattr(node, "cases", [])]:
                waiting += [(child, False, deeper) for child in block.body]

    # --- both ----------------------------------------------------------------------------------

    def after(self, source: str, failed_at: Optional[int], namespace: Dict[str, Any]) -> None:
        """Take in what one ended cell imported."""
        if self._tool is None:
            if "import" in source:
                self._from_evidence(source, failed_at, namespace)
            if self._possible and len(sys.modules) != len(self._loaded):
                self._ran += [statement for statement in self._possible if statement[0] in sys.modules]
                self._possible = [statement for statement in self._possible if statement[0] not in sys.modules]
            if len(sys.modules) != len(self._loaded):
                self._loaded = set(sys.modules)
        for code in self._once:
            self._watched.pop(code, None)
        self._once.clear()
        ran, self._ran = self._ran, []
        for name, taken in ran:
            for full in [name, *[f"{name}.{item}" for item in taken]]:
                if full != "__future__" and sys.modules.get(full) is not None:
                    self._names[full] = None

    def names(self, bound: Dict[int, types.ModuleType]) -> List[str]:
        """All names, oldest first; ``bound`` are the modules found in the namespace, by id."""
        known = {id(sys.modules.get(name)) for name in self._names} | {
            id(sys.modules.get(name.partition(".")[0])) for name in self._names
        }
        for module in bound.values():
            name = types.ModuleType.__getattribute__(module, "__dict__").get("__name__")
            if id(module) not in known and type(name) is str and name.isidentifier() | ("." in name):
                self._names[name] = None
        return list(self._names)[:KEPT]


def _statements(node: Any) -> Iterator[Tuple[Statement, Optional[str]]]:
    """What a statement imports, and the name it binds."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield (alias.name, ()), alias.asname or alias.name.partition(".")[0]
    elif node.module and not node.level:
        for alias in node.names:
            yield (node.module, (alias.name,)), alias.asname or alias.name


def _is_bound(statement: Statement, bound: Optional[str], namespace: Dict[str, Any]) -> bool:
    """True when ``bound`` names in the namespace what the statement would have put there."""
    name, taken = statement
    module = sys.modules.get(name)
    if bound not in namespace or type(module) is not types.ModuleType:
        return False
    if taken:
        return namespace[bound] is vars(module).get(taken[0], bound)
    return namespace[bound] is module or namespace[bound] is sys.modules.get(name.partition(".")[0])
