"""Checks of a notebook's parameters, made in its second cell, before any long work.

Papermill sets a notebook's parameters without looking at them: it only warns of a name that the
notebook does not have, and a YAML file's ``1e-3`` arrives as text. So a notebook says what it may
be given::

    check_parameters(
        globals(),
        n=positive_int,
        activation=one_of("relu", "tanh"),
        p_over_dn=list_of(positive),
    )
"""

import ast
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class Spec:
    """What a parameter may be.

    Attributes:
        expected: the allowed values in words, to follow "expected".
        accepts: whether a value is allowed.
    """

    expected: str
    accepts: Callable[[object], bool]


def _is_int(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


positive_int = Spec("a whole number of at least 1", lambda v: _is_int(v) and v >= 1)
non_negative_int = Spec("a whole number of at least 0", lambda v: _is_int(v) and v >= 0)
positive = Spec("a finite number above 0", lambda v: _is_number(v) and v > 0)
boolean = Spec("True or False", lambda v: isinstance(v, bool))
text = Spec("text", lambda v: isinstance(v, str))


def between(low: float, high: float) -> Spec:
    """Finite numbers from ``low`` to ``high``, both included."""
    return Spec(f"a number from {low} to {high}", lambda v: _is_number(v) and low <= v <= high)


def one_of(*values: object) -> Spec:
    """Exactly one of ``values``, of the same type: True is not 1."""
    names = ", ".join(repr(value) for value in values)
    return Spec(
        f"one of {names}", lambda v: any(type(v) is type(value) and v == value for value in values)
    )


def list_of(spec: Spec) -> Spec:
    """A list with at least one item, every item as ``spec`` says."""
    return Spec(
        f"a list of at least one item, each {spec.expected}",
        lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(map(spec.accepts, v)),
    )


def optional(spec: Spec) -> Spec:
    """None, or what ``spec`` says."""
    return Spec(f"None or {spec.expected}", lambda v: v is None or spec.accepts(v))


def check_parameters(namespace: Mapping[str, object], /, **specs: Spec) -> None:
    """Check a notebook's parameters; call it in the cell after the one tagged ``parameters``.

    Args:
        namespace: the notebook's ``globals()``, or any mapping from names to values.
        **specs: for every parameter of the notebook, what it may be.

    Raises:
        TypeError: if something that is not a Spec was given for a parameter.
        ValueError: naming every parameter that is unknown, not set or not as its Spec says, with
            what was expected and what came.
    """
    for name, spec in specs.items():
        if not isinstance(spec, Spec):
            raise TypeError(
                f"the check of parameter {name!r}: expected a Spec such as positive_int, "
                f"got {_describe(spec)}"
            )
    problems = [
        f"{name}: no such parameter; there are {', '.join(specs)}"
        for name in injected_names(namespace.get("In", ()))
        if name not in specs
    ]
    for name, spec in specs.items():
        if name not in namespace:
            problems.append(f"{name}: expected {spec.expected}, but it is not set")
        elif not spec.accepts(namespace[name]):
            value = namespace[name]
            problems.append(
                f"{name}: expected {spec.expected}, got {_describe(value)}{_hint(value)}"
            )
    if problems:
        raise ValueError("parameters of this notebook:\n  " + "\n  ".join(problems))


def injected_names(cells: Iterable[str]) -> list[str]:
    """Names set by papermill among the ``cells`` run so far (IPython keeps them as ``In``).

    Papermill puts its parameters in a cell of assignments below the comment ``# Parameters``. A
    plain look at the namespace could not tell an unknown parameter from a variable of a later cell
    when the reader runs the check a second time.
    """
    names = []
    for source in cells:
        if source.lstrip().startswith("# Parameters\n"):
            names += assigned_names(source)
    return names


def assigned_names(source: str) -> list[str]:
    """Names that the top-level assignments of ``source`` set, in order."""
    names = []
    for statement in ast.parse(source).body:
        match statement:
            case ast.Assign(targets=targets):
                names += [target.id for target in targets if isinstance(target, ast.Name)]
            case ast.AnnAssign(target=ast.Name(id=name), value=value) if value is not None:
                names.append(name)
    return names


def _describe(value: object) -> str:
    return f"{reprlib.repr(value)} ({type(value).__name__})"


def _hint(value: object) -> str:
    """A hint when a value is, or holds, a number that YAML took for text."""
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, str):
            try:
                number = float(item)
            except ValueError:
                continue
            return f"; in YAML write a number with a dot, as in {number:.1e}, and without quotes"
    return ""
