"""Writes the cards of data and models: what each is, where it comes from, under which terms.

All of it is read from the code: docstrings, defaults, and two samples of every data set that ships
with the packages.
"""

import importlib
import inspect
import re
from pathlib import Path

import paperlib as pl

# What a loader needs besides the number of samples; None where it needs files from elsewhere.
LOADERS = {
    "photographs": {},
    "digits": {},
    "faces": {},
    "cifar10": None,
    "image_folder": None,
    "sphere": {"d": 100},
}

MODELS = ("RandomFeatures", "GivenFeatures", "TwoLayer", "ResNet", "VisionTransformer")

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises):$", re.MULTILINE)
ENTRY = re.compile(r"^    (\*{0,2}\w+): (.*(?:\n      .*)*)", re.MULTILINE)


def write_cards(folder: Path) -> None:
    """Writes cards.rst into a folder."""
    (folder / "cards.rst").write_text("\n".join(cards()) + "\n", encoding="utf-8")


def cards() -> list[str]:
    """The page."""
    lines = heading("Cards of data and models", "=")
    lines += ["Read from the code; the :doc:`public names <reference>` have every option.", ""]
    lines += heading("Data", "-")
    lines += [*body(pl.DataSet), ""]
    for name in LOADERS:
        lines += data_card(name)
    lines += heading("Models", "-")
    lines += ["Weights are drawn anew from a seed; no trained weights are shipped or loaded.", ""]
    for name in MODELS:
        lines += model_card(name)
    return lines


def data_card(name: str) -> list[str]:
    """What a loader returns, from where, under which terms, and its options."""
    loader = getattr(pl, name)
    source, licence = origin(name)
    lines = [*heading(f"``{name}``", "~"), *body(loader), ""]
    lines += [f":returns: {' '.join(section(loader, 'Returns').split())}"]
    lines += [f":source: {source}", ":licence:"]
    lines += [f"   | {part}" for part in licence.split("; ")]
    return [*lines, "", *options(loader)]


def origin(name: str) -> tuple[str, str]:
    """Source and licence: those of two samples, or what the module says of files from elsewhere."""
    extra = LOADERS[name]
    if extra is not None:
        data = getattr(pl, name)(2, **extra)
        return data.source, data.licence
    module = importlib.import_module(f"paperlib.data.{name}")
    defaults = inspect.signature(getattr(pl, name)).parameters
    if hasattr(module, "SOURCE"):
        return module.SOURCE, module.LICENCE
    return "the folder", defaults["licence"].default


def model_card(name: str) -> list[str]:
    """What a model computes, where its shape comes from, and its options."""
    model = getattr(pl, name)
    return [*heading(f"``{name}``", "~"), *body(model), "", *options(model)]


def body(thing: object) -> list[str]:
    """A docstring up to its first section."""
    text = SECTION.split(inspect.getdoc(thing))[0].rstrip()
    return re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", text).replace("|", r"\|").splitlines()


def section(thing: object, name: str) -> str:
    """The text of a section of a docstring, or nothing."""
    parts = SECTION.split(inspect.getdoc(thing))
    return dict(zip(parts[1::2], parts[2::2], strict=True)).get(name, "").strip("\n")


def options(thing: object) -> list[str]:
    """A table of the arguments: name, default, meaning."""
    documented = thing.__init__ if inspect.isclass(thing) else thing
    meanings = dict(ENTRY.findall(section(documented, "Args")))
    lines = [".. list-table::", "   :header-rows: 1", "   :widths: 20 20 60", ""]
    lines += ["   * - argument", "     - default", "     - meaning"]
    for parameter in inspect.signature(thing).parameters.values():
        required = parameter.default is inspect.Parameter.empty
        meaning = " ".join(meanings[parameter.name].split()).replace("|", r"\|")
        meaning = re.sub(r"(?<!`)`([^`]+)`(?!`)", r"``\1``", meaning)
        lines += [
            f"   * - ``{parameter.name}``",
            "     - " + ("required" if required else f"``{parameter.default!r}``"),
            f"     - {meaning}",
        ]
    return [*lines, ""]


def heading(text: str, mark: str) -> list[str]:
    """A heading of reStructuredText."""
    return [text, mark * len(text), ""]
