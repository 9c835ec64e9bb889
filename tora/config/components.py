"""`_component_` mappings: checked without importing anything, and called by `instantiate`.

A wrong config must be rejected before torch is imported. `check_component` therefore parses the source of callables in
Tora's own packages. Other callables are checked against their signature when they are called.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from tora.config.aliases import ours_for
from tora.config.convert import join, show
from tora.config.schema import Component
from tora.errors import ConfigError, ToraError, first_line, nearest, raised

_ROOT = Path(__file__).resolve().parents[2]
_OWN = ("tora", "actors", "learner")
_FORMER = {"tora.tasks.rewards": "tora.rewards"}
"""Former module names that configs may still use, with the present ones."""
_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Definition = _Function | ast.ClassDef | None
"""None: the name is bound in a way that does not show its arguments, such as an assignment."""
_Bindings = dict[str, "_Definition | str"]
"""Names bound at a module's top level. One imported from our own packages maps to its dotted path."""


def instantiate(component: Component, *args: Any, **offered: Any) -> Any:
    """Call the component's callable with `args` and the component's own arguments.

    An `offered` argument is passed only if the callable has a parameter of that name and the component does not set it,
    so that callables with and without that parameter can be called alike. Raises ConfigError if the path does not
    exist or an argument is unknown or missing. What the callable itself raises passes through.
    """
    path = _path_of(component, "")
    target = locate(path)
    own = {name: value for name, value in component.items() if name != "_component_"}
    try:
        signature = inspect.signature(target)
    except ValueError:  # some builtins have no signature; Python checks the call
        return target(*args, **own)
    names = _keywords(signature)
    if names is None:
        return _call(target, signature, path, args, {**offered, **own})
    _refuse_unknown(path, own, names, "")
    taken = {name: value for name, value in offered.items() if name in names}
    return _call(target, signature, path, args, {**taken, **own})


def make(component: Component, key: str, *args: Any, **offered: Any) -> Any:
    """`instantiate`, for what a user's config names under `key`: what the callable raises becomes a ConfigError."""
    try:
        return instantiate(component, *args, **offered)
    except (ToraError, MemoryError):
        raise
    except Exception as error:  # a user's code, or a library's with a user's arguments
        own = {name: value for name, value in component.items() if name != "_component_"}
        given = f" from {show(own)}" if own else ""
        what = f"{key}: {component['_component_']} cannot be made{given}"
        raise ConfigError(f"{what}: it raised {raised(error)}") from error


_OBJECTS = "python"
_objects: dict[str, Callable[..., Any]] = {}


def register(name: str, target: Callable[..., Any]) -> str:
    """A dotted path, `python.NAME`, under which `locate` finds an object of a program in this process. A later one of
    the same name gets another path."""
    path, number = f"{_OBJECTS}.{name}", 1
    while _objects.get(path, target) is not target:
        number += 1
        path = f"{_OBJECTS}.{name}_{number}"
    _objects[path] = target
    return path


def registered(components: Iterable[Component]) -> dict[str, Callable[..., Any]]:
    """The objects among the components, by their path."""
    paths = [str(component.get("_component_")) for component in components]
    return {path: _objects[path] for path in paths if path in _objects}


def restore(objects: Mapping[str, Callable[..., Any]]) -> None:
    """Have `locate` find in this process what `registered` has found in another."""
    _objects.update(objects)


def locate(path: str) -> Callable[..., Any]:
    """The callable at a dotted path, which may be a former one; modules in the working directory count.

    Raises ConfigError if there is none, or if its module raises when it is imported.
    """
    path = _present(path)
    if path in _objects:
        return _objects[path]
    import_from(())
    module, names = _import_longest(path)
    found: Any = module
    for name in names:
        if not hasattr(found, name):
            options = [option for option in dir(found) if not option.startswith("_")]
            raise ConfigError(f"_component_={path}: {name} does not exist{nearest(name, options)}.")
        found = getattr(found, name)
    if not callable(found):
        raise ConfigError(f"_component_={path} cannot be called.")
    return found


def import_from(folders: Iterable[str]) -> None:
    """Look up modules in the working directory and then in these folders too, here and in processes started from here;
    after everything that is installed, so that no file of the user's hides a package."""
    for folder in (os.getcwd(), *folders):
        if folder not in sys.path:
            sys.path.append(folder)


def is_own(component: Component) -> bool:
    """Whether the component is of our own packages."""
    return str(component["_component_"]).split(".")[0] in _OWN


def check_component(component: Component, key: str) -> None:
    """Check that `_component_` is given and, for our own packages, that the callable and its arguments exist.

    Imports nothing. `key` is the component's dotted path in the config. Raises ConfigError if they do not.
    """
    path, definition, bound = _definition_of(component, key)
    names = _parameters(definition, bound)
    if names is not None:
        own = {name: value for name, value in component.items() if name != "_component_"}
        _refuse_unknown(path, own, names, key)


def check_reward(component: Component, key: str) -> None:
    """`check_component` for a reward function.

    The config may set its keyword-only parameters, `name`, `weight`, `timeout_score` and `accuracy`. Its other
    parameters, including `**columns`, receive the dataset's columns. Raises ConfigError as `check_component` does.
    """
    path, definition, _ = _definition_of(component, key)
    if isinstance(definition, ast.ClassDef):
        made_by = (node for node in definition.body if isinstance(node, _Function) and node.name == "__init__")
        definition = next(made_by, None)
    if isinstance(definition, _Function) and not definition.decorator_list:
        own = {name: value for name, value in component.items() if name != "_component_"}
        settings = ["name", "weight", "timeout_score", "accuracy"]
        _refuse_unknown(path, own, [*settings, *(arg.arg for arg in definition.args.kwonlyargs)], key)


def check_path(path: str, key: str) -> None:
    """Check that `path` is dotted and, for our own packages, that it leads to a callable. Imports nothing. `key` is its
    place in the config. Raises `ConfigError`."""
    found = _dotted(path, key)
    if found.split(".")[0] in _OWN:
        _find(found, key)


def class_literal(component: Component, key: str, name: str, *, default: Any) -> Any:
    """The literal that the component's class, or the nearest of its bases, assigns to `name`; nothing is imported.

    `default` if none does, and for components outside our own packages. `key` is where the component stands in the
    config. Raises ConfigError if the component does not exist.
    """
    _, definition, bound = _definition_of(component, key)
    value = _assigned(definition, bound, name)
    return default if value is None else ast.literal_eval(value)


def _definition_of(component: Component, key: str) -> tuple[str, _Definition, _Bindings]:
    """The component's path and, in our own packages, its definition and the names bound in that module."""
    path = _path_of(component, key)
    if path.split(".")[0] not in _OWN:
        return path, None, {}
    definition, bound = _find(path, join(key, "_component_"))
    return path, definition, bound


def _path_of(component: Component, key: str) -> str:
    path = component.get("_component_")
    if path is None:
        raise ConfigError(f"Missing key {join(key, '_component_')}.")
    return _dotted(path, join(key, "_component_"))


def _dotted(path: Any, key: str) -> str:
    if not (isinstance(path, str) and "." in path and all(part.isidentifier() for part in path.split("."))):
        raise ConfigError(f"{key}={show(path)} must be a dotted path, as in package.module.name.")
    return _present(path)


def _present(path: str) -> str:
    """The path by which a callable is found today."""
    module, _, name = path.rpartition(".")
    return f"{_FORMER.get(module, module)}.{name}"


def _refuse_unknown(path: str, own: Mapping[str, Any], names: Iterable[str], key: str) -> None:
    for name, value in own.items():
        if name not in names:
            known = ours_for(str(name), value)
            if known is not None:
                raise ConfigError(f"{join(key, name)}={show(value)} is not an argument of {path}; {known}")
            near = nearest(str(name), names)
            raise ConfigError(f"{join(key, name)}={show(value)} is not an argument of {path}{near}.")


def _import_longest(path: str) -> tuple[ModuleType, list[str]]:
    """The innermost module on the path, imported, and the names that remain."""
    parts = path.split(".")
    for i in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:i])
        try:
            return importlib.import_module(name), parts[i:]
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise _not_importable(path, error) from error  # the module exists but imports one that does not
        except ConfigError:
            raise
        except Exception as error:  # a user's module may raise anything
            raise _not_importable(path, error) from error
    raise ConfigError(f"_component_={path}: there is no module {parts[0]}.")


def _not_importable(path: str, error: Exception) -> ConfigError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "importlib" not in frame.filename]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if len(frames) > 1 else ""
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}, line {error.lineno})"
    reason = error.msg if isinstance(error, SyntaxError) else first_line(error)
    return ConfigError(f"_component_={path} cannot be imported: {type(error).__name__}: {reason}{place}.")


def _keywords(signature: inspect.Signature) -> list[str] | None:
    """Names that may be passed by keyword; None if any may."""
    parameters = signature.parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _call(
    target: Callable[..., Any], signature: inspect.Signature, path: str, args: tuple[Any, ...], own: Mapping[str, Any]
) -> Any:
    try:
        signature.bind(*args, **own)
    except TypeError as error:
        raise ConfigError(f"_component_={path} rejects these arguments: {error}.") from error
    return target(*args, **own)


def _find(path: str, key: str) -> tuple[_Definition, _Bindings]:
    """The definition behind a dotted path into our own packages, and the names bound in its module.

    Raises ConfigError if there is none; `key` names the path in the message.
    """
    file, names = _source_of(path)
    if not names:
        raise ConfigError(f"{key}={show(path)} is a module, not a callable.")
    bound = _bindings(file)
    if names[0] not in bound:
        prefix = path.removesuffix(".".join(names))
        is_package = file.name == "__init__.py"
        offers = (ast.AST, str) if is_package else ast.AST  # a package re-exports what it imports from ours
        options = [prefix + name for name, found in bound.items() if isinstance(found, offers) and name[0] != "_"]
        if is_package:
            modules = (p.stem for p in file.parent.glob("*.py") if p.stem != "__init__")
            options += [".".join([prefix + module, *names[1:]]) for module in modules]
        raise ConfigError(f"{key}={show(path)} does not exist{nearest(path, options)}.")
    found = bound[names[0]]
    if isinstance(found, str):
        return _find(".".join([found, *names[1:]]), key)
    return found if len(names) == 1 else None, bound


def _source_of(path: str) -> tuple[Path, list[str]]:
    """The file of the innermost module on the path, and the names that remain."""
    names, place = path.split("."), _ROOT
    while names:
        if (place / f"{names[0]}.py").is_file():
            return place / f"{names[0]}.py", names[1:]
        if not (place / names[0]).is_dir():
            break
        place /= names.pop(0)
    return place / "__init__.py", names


def _bindings(file: Path) -> _Bindings:
    bound: _Bindings = {}
    for node in ast.parse(file.read_text()).body if file.is_file() else ():
        if isinstance(node, _Function | ast.ClassDef):
            bound[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            ours = node.level == 0 and (node.module or "").split(".")[0] in _OWN
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{node.module}.{alias.name}" if ours else None
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            bound.update({target.id: None for target in targets if isinstance(target, ast.Name)})
    return bound


def _parameters(definition: _Definition, bound: _Bindings) -> list[str] | None:
    """Names that the definition takes by keyword; None if it takes any, or if the source alone does not tell."""
    if isinstance(definition, ast.ClassDef):
        return _parameters_of_class(definition, bound)
    if definition is None or definition.decorator_list or definition.args.kwarg:
        return None
    return [arg.arg for arg in definition.args.args + definition.args.kwonlyargs]


def _parameters_of_class(definition: ast.ClassDef, bound: _Bindings) -> list[str] | None:
    for node in definition.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            names = _parameters(node, bound)
            return None if names is None else names[1:]
    if not any("dataclass" in ast.unparse(node) for node in definition.decorator_list):
        return None
    annotations = [node for node in definition.body if isinstance(node, ast.AnnAssign)]
    annotated = [node.target for node in annotations if not ast.unparse(node.annotation).startswith("ClassVar")]
    fields = [target.id for target in annotated if isinstance(target, ast.Name)]
    for base in definition.bases:
        found = bound.get(ast.unparse(base))
        inherited = _parameters(*(_find(found, "") if isinstance(found, str) else (found, bound)))
        if inherited is None:
            return None
        fields += [name for name in inherited if name not in fields]
    return fields


def _assigned(definition: _Definition, bound: _Bindings, name: str) -> ast.expr | None:
    """What a class body assigns to `name`, its bases searched too; None if that cannot be read from the source."""
    if not isinstance(definition, ast.ClassDef):
        return None
    for node in definition.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node.value
    for base in definition.bases:
        found = bound.get(ast.unparse(base))
        value = _assigned(*(_find(found, "") if isinstance(found, str) else (found, bound)), name)
        if value is not None:
            return value
    return None
