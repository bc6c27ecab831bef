"""Writes the two pages of the reference: the public names, and every module behind them."""

import ast
import re
from pathlib import Path

from cards import heading

import paperlib

# Modules in which a reader finds something that is not among the public names.
PACKAGES = {
    "paperlib": "The package, one idea a file",
    "paperlib.data": "Data",
    "paperlib.networks": "Networks",
    "paperlib.experiments": "Experiments, one for each chapter",
}


def write_reference(folder: Path) -> None:
    """Writes reference.rst and modules.rst into a folder."""
    package = Path(paperlib.__file__).parent
    pages = {
        "reference.rst": public_names(package / "__init__.py"),
        "modules.rst": modules(package),
    }
    for name, lines in pages.items():
        text = "\n".join(lines) + "\n"
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def sections(init: Path) -> list[tuple[str, list[str]]]:
    """The comments over groups of imports in __init__.py, each with the names imported below it."""
    lines = init.read_text(encoding="utf-8").splitlines()
    found: list[tuple[str, list[str]]] = []
    for node in ast.parse("\n".join(lines)).body:
        if not isinstance(node, ast.ImportFrom):
            continue
        above = []
        for line in reversed(lines[: node.lineno - 1]):
            if not line.startswith("# "):
                break
            above.insert(0, line.removeprefix("# "))
        if above:
            found.append((" ".join(above), []))
        found[-1][1].extend(alias.name for alias in node.names)
    return found


def public_names(init: Path) -> list[str]:
    """The page of public names, in the order of __init__.py."""
    lines = heading("Public names", "=")
    lines += ["Everything below is imported by ``import paperlib as pl``.", ""]
    for comment, names in sections(init):
        title, _, rest = comment.partition(": ")
        lines += heading(title.rstrip("."), "-")
        lines += [sentence(rest), ""] if rest else []
        for name in names:
            lines += directive(kind(name), f"paperlib.{name}")
    return lines


def kind(name: str) -> str:
    """The directive that documents a public name, told by its case."""
    if name.isupper():
        return "autodata"
    return "autoclass" if name[0].isupper() else "autofunction"


def modules(package: Path) -> list[str]:
    """The page of modules, in alphabetical order in each package."""
    public = set(paperlib.__all__)
    lines = heading("Modules", "=")
    lines += ["What the package is made of, without the :doc:`public names <reference>`.", ""]
    for name, title in PACKAGES.items():
        lines += heading(title, "-")
        folder = package.joinpath(*name.split(".")[1:])
        for path in sorted(folder.glob("*.py")):
            if path.stem.startswith("_"):
                continue
            module = f"{name}.{path.stem}"
            lines += heading(f"``{module}``", "~")
            lines += directive("automodule", module)[:-1]
            # Public names have their place on the other page.
            lines += [f"   :exclude-members: {', '.join(sorted(public))}"]
            # A function of the same name hides the module.
            lines += ["   :no-index:"] * (module.split(".", 1)[1] in public) + [""]
    return lines


def directive(name: str, target: str) -> list[str]:
    """One directive of autodoc."""
    options = {
        "autoclass": ["   :members:", "   :inherited-members: Module, tuple, object"],
        "automodule": ["   :members:"],
    }
    return [f".. {name}:: {target}", *options.get(name, []), ""]


def sentence(text: str) -> str:
    """With a capital, and what stands in backticks as code."""
    return re.sub(r"`([^`]+)`", r"``\1``", text[:1].upper() + text[1:])


def plain_docstring(app, what, name, obj, options, lines):
    """Says to reStructuredText what docstrings leave to the eye.

    |x| is no substitution, (n, *shape) is no emphasis, and only a name can be a link.
    """
    for k, line in enumerate(lines):
        line = re.sub(r"\||(?<=[( ])\*(?=\w+\))", r"\\\g<0>", line)
        lines[k] = re.sub(r"(?<!:)(`+)(.+?)\1(?![`_])", literal_unless_name, line)


def literal_unless_name(span):
    """What stands between backticks, in the marks of reStructuredText."""
    ticks, text = span.groups()
    is_name = len(ticks) == 1 and re.fullmatch(r"[\w.]+", text)
    return span[0] if is_name else f"``{text}``"


def setup(app):
    """Tells Sphinx."""
    app.connect("autodoc-process-docstring", plain_docstring)
    return {"parallel_read_safe": True}
