"""The imports of a source file, read from its syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from typing import NamedTuple


class Import(NamedTuple):
    module: str
    """Dotted, including the imported name: `tora.types.Group`."""
    line: int


def imports(nodes: Iterable[ast.AST]) -> list[Import]:
    """The imports among `nodes`. Raises AssertionError if one is relative."""
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [Import(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"line {node.lineno}: a relative import"
            found += [Import(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def packages(found: Iterable[Import]) -> set[str]:
    return {each.module.split(".")[0] for each in found}


def at_import_time(tree: ast.Module) -> Iterator[ast.stmt]:
    """Statements that run when the module is imported: none inside functions or under `TYPE_CHECKING`."""
    todo: list[ast.stmt] = list(tree.body)
    while todo:
        node = todo.pop()
        yield node
        checking = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if not checking and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            todo += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)]
