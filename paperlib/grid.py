"""The grid of a sweep: a list of cells, each a dict of parameters, checked before any cell runs.

A cell is named by a hash of its parameters and of the version of the experiment, so that the same
question is never computed twice and a changed experiment never answers with old numbers.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
import json
import math
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

# Columns that every table of results has beside its parameters and results.
RESERVED = ("status", "error", "seconds", "version")


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its place in the grid, its parameters, and its name in a store."""

    position: int
    parameters: dict[str, object]
    key: str


def plain(value: object, name: str) -> object:
    """`value` in the types a record can hold: None, bool, int, float, str, lists and dicts of them.

    NumPy scalars and arrays or tensors without axes become Python scalars; tuples become lists.

    Raises:
        TypeError: for anything else, naming `name`.
    """
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item, f"{name}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str) or key.startswith("$"):
                raise TypeError(f"{name} has the key {key!r}: keys must be text not begun by '$'")
        return {key: plain(item, f"{name}[{key!r}]") for key, item in value.items()}
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        scalar = value.item()
        if type(scalar) in (bool, int, float, str):
            return scalar
    hint = "; call .tolist() on arrays" if getattr(value, "shape", None) else ""
    raise TypeError(
        f"{name} must be None, a bool, a number, text, or lists and dicts of these, "
        f"got {type(value).__name__}{hint}"
    )


def to_json(value: object) -> str:
    """Strict JSON of a plain value; floats round-trip exactly, and nan and inf have a form."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return json.dumps(_spell_floats(value), allow_nan=False, separators=(",", ":"))


def from_json(text: str | bytes) -> object:
    """The plain value of which `to_json` made `text`."""
    spelled = b'"$float"' in text if isinstance(text, bytes) else '"$float"' in text
    return json.loads(text, object_hook=_unspell_float if spelled else None)


def _spell_floats(value: object) -> object:
    # JSON has no nan and no inf; Python's own spelling of them breaks every other reader.
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if isinstance(value, list):
        return [_spell_floats(item) for item in value]
    if isinstance(value, dict):
        return {key: _spell_floats(item) for key, item in value.items()}
    return value


def _unspell_float(found: dict) -> object:
    return float(found["$float"]) if found.keys() == {"$float"} else found


def cell_key(parameters: Mapping[str, object], version: str) -> str:
    """SHA-256 of the parameters (in any order) and of the version of the experiment."""
    named = to_json({name: parameters[name] for name in sorted(parameters)})
    return hashlib.sha256(f"{version}\n{named}".encode()).hexdigest()


def experiment_version(function: Callable, version: str = "auto") -> str:
    """The text that changes when the experiment does: its qualified name and a version.

    With `version="auto"` that is a hash of the source of `function` itself. Comments, layout and
    its docstring do not count; neither does what it calls or the global names it reads, so a
    change there asks for a version of one's own, such as `version="2"`.

    Raises:
        ValueError: if "auto" cannot tell two experiments apart: the source is not to be had, or
            the function holds values of an enclosing scope.
        TypeError: if `function` has no qualified name, or `version` is not text.
    """
    if not callable(function) or not hasattr(function, "__qualname__"):
        raise TypeError(f"function must be a function with a name, got {function!r}")
    if not isinstance(version, str) or not version:
        raise TypeError(f'version must be text such as "1", or "auto", got {version!r}')
    name = f"{function.__module__}.{function.__qualname__}"
    if version != "auto":
        return f"{name}@{version}"
    if getattr(function, "__closure__", None):
        raise ValueError(
            f"{name} holds values of an enclosing scope ({function.__code__.co_freevars}), which "
            'its source does not show: make them parameters, or give version="1"'
        )
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError) as error:
        raise ValueError(f'the source of {name} is not to be had: give version="1"') from error
    body = tree.body[0]
    if not isinstance(body, ast.FunctionDef):
        raise ValueError(f'{name} is not written as a def: give version="1"')
    if ast.get_docstring(body) is not None:
        body.body = body.body[1:] or [ast.Pass()]
    return f"{name}#{hashlib.sha256(ast.unparse(tree).encode()).hexdigest()[:16]}"


def check_grid(
    function: Callable[..., Mapping],
    grid: Iterable[Mapping[str, object]],
    *,
    version: str = "auto",
    check: Callable[..., object] | None = None,
) -> list[Cell]:
    """The cells of a grid, in order, each with every parameter of `function`.

    Parameters that a cell leaves out take the function's defaults and count as given. Values are
    held to the function's annotations where those are plain types (bool, int, float, str, None,
    list, dict, Literal and unions of them); a whole number given for a float becomes a float.

    Args:
        function: the experiment, called as `function(**cell)`.
        grid: the cells.
        version: see `experiment_version`.
        check: called as `check(**cell)` for every cell; raises for values that make no sense.

    Raises:
        TypeError: for a parameter that is unknown, missing, of the wrong type, or not storable.
        ValueError: for no cells, a cell that is there twice, a parameter named like a column of
            the table, or a value that `check` refuses.
    """
    version = experiment_version(function, version)
    if isinstance(grid, Mapping | str):
        raise TypeError(f"grid must be a list of dicts, got {type(grid).__name__}")
    signature = inspect.signature(function)
    annotations = _annotations(function)
    cells: list[Cell] = []
    seen: dict[str, int] = {}
    for position, given in enumerate(grid):
        where = f"grid[{position}]"
        if not isinstance(given, Mapping):
            raise TypeError(f"{where} must be a dict of parameters, got {given!r}")
        parameters = _complete(signature, given, where)
        for name, value in parameters.items():
            value = plain(value, f"{where}[{name!r}]")
            annotation = annotations.get(name) if name in given else None
            parameters[name] = _typed(value, annotation, f"{where}[{name!r}]")
        if check is not None:
            try:
                check(**parameters)
            except (TypeError, ValueError) as error:
                raise type(error)(f"{where}: {error}") from error
        key = cell_key(parameters, version)
        if key in seen:
            raise ValueError(f"{where} is the same cell as grid[{seen[key]}]: {parameters}")
        seen[key] = position
        cells.append(Cell(position, parameters, key))
    if not cells:
        raise ValueError("grid must hold at least one cell, got none")
    return cells


def _complete(signature: inspect.Signature, given: Mapping, where: str) -> dict[str, object]:
    """The parameters of one cell in the order of the signature, defaults filled in."""
    kinds = inspect.Parameter
    named, takes_any = {}, False
    for parameter in signature.parameters.values():
        if parameter.kind is kinds.VAR_KEYWORD:
            takes_any = True
        elif parameter.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY):
            named[parameter.name] = parameter.default
        else:
            raise TypeError(f"function must take its parameters by name, got {signature}")
    for name in given:
        if not isinstance(name, str):
            raise TypeError(f"{where} must name its parameters by text, got {name!r}")
        if name not in named and not takes_any:
            close = difflib.get_close_matches(name, named, n=1)
            guess = f" (did you mean {close[0]!r}?)" if close else ""
            raise TypeError(
                f"{where} has the unknown parameter {name!r}{guess}: expected {sorted(named)}"
            )
    missing = [n for n, default in named.items() if n not in given and default is kinds.empty]
    if missing:
        raise TypeError(f"{where} lacks the parameters {missing}")
    complete = {name: given.get(name, default) for name, default in named.items()}
    complete |= {name: value for name, value in given.items() if name not in named}
    for name in complete:
        if name in RESERVED:
            raise ValueError(f"{where}: {name!r} is a column of every table, not a parameter")
    return complete


def _annotations(function: Callable) -> dict[str, object]:
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # names known to the type checker alone
        return {}


def _typed(value: object, annotation: object, name: str) -> object:
    if annotation is None or _fits(value, annotation):
        return value
    # 1 and 1.0 are one cell where the function asks for a float.
    items = value if isinstance(value, list) else [value]
    floats = [float(item) if type(item) is int else item for item in items]
    if _fits(floats if isinstance(value, list) else floats[0], annotation):
        return floats if isinstance(value, list) else floats[0]
    raise TypeError(f"{name} must be {_spelled(annotation)}, got {value!r}")


def _spelled(annotation: object) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _fits(value: object, annotation: object) -> bool:
    """Whether a plain value has an annotated type; annotations that are not plain admit all."""
    if annotation in (bool, int, float, str, types.NoneType):
        return type(value) is annotation
    origin, options = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in options)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in options)
    if annotation in (list, tuple) or origin in (list, tuple, Sequence):
        alike = options and (origin is not tuple or options[1:] == (...,))
        inner = options[0] if alike else typing.Any
        return isinstance(value, list) and all(_fits(item, inner) for item in value)
    if annotation is dict or origin is dict:
        return isinstance(value, dict)
    return True
