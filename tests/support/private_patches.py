"""Finds the places where a test replaces a private name of ours, in a test file's syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from imports import imports

BY_NAME = ("setattr", "delattr", "patch.object")
BY_MAPPING = ("setitem", "delitem", "patch.dict")
BY_PATH = ("setattr", "delattr", "patch", "patch.dict")


def private_patches(tree: ast.Module, ours: tuple[str, ...]) -> list[str]:
    """One line for each place that patches or assigns a private name. `ours` are the top-level packages with private
    names; a name that a file imports from another package belongs to that package and may be patched."""
    foreign = _foreign_names(tree, ours)
    return [
        f"line {node.lineno}: {name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.expr | ast.stmt)
        for name in _patched(node, ours)
        if name.split(".")[0] not in foreign and is_private(name)
    ]


def is_private(name: str) -> bool:
    last = name.rsplit(".", 1)[-1]
    return last.startswith("_") and not last.endswith("__")


def _foreign_names(tree: ast.Module, ours: tuple[str, ...]) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias, each in zip(node.names, imports([node]), strict=True):
                if each.module.split(".")[0] not in ours:
                    found.add(alias.asname or alias.name.split(".")[0])
    return found


def _patched(node: ast.expr | ast.stmt, ours: tuple[str, ...]) -> Iterator[str]:
    """Dotted names that a statement or call replaces; those of `self` are a class's own."""
    if isinstance(node, ast.Call):
        yield from _patched_by_call(node, ours)
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign | ast.Delete):
        targets = node.targets
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        targets = [node.target]
    for target in targets:
        for part in ast.walk(target):
            if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store | ast.Del):
                name = ast.unparse(part)
                if not name.startswith(("self.", "cls.")):
                    yield name


def _patched_by_call(call: ast.Call, ours: tuple[str, ...]) -> Iterator[str]:
    called = ast.unparse(call.func)
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if not arguments:
        return
    first, texts = arguments[0], [a.value if isinstance(a, ast.Constant) else None for a in arguments]
    if isinstance(texts[0], str):
        if _is_one_of(called, BY_PATH) and texts[0].split(".")[0] in ours:
            yield texts[0]
    elif _is_one_of(called, BY_NAME) and len(texts) > 1 and isinstance(texts[1], str):
        yield f"{ast.unparse(first)}.{texts[1]}"
    elif _is_one_of(called, BY_MAPPING):
        yield ast.unparse(first)


def _is_one_of(called: str, functions: tuple[str, ...]) -> bool:
    return any(called == name or called.endswith(f".{name}") for name in functions)
