"""Alternative text for the pictures in a notebook, for readers who cannot see them."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode

from paperlib.notebook_source import syntax

PNG = "image/png"
CAPTION = re.compile(r"^\*\*(Figure \d+)\.\*\*\s+(.*?)(?:\n\s*\n|\Z)", re.MULTILINE | re.DOTALL)


def describe_pictures(notebook: NotebookNode, figures: Path) -> None:
    """Gives every picture its alternative text, where nbconvert and the book look for it.

    A picture that its cell saves with `save_figure(figure, "NAME", ...)` has the text of
    `figures/NAME.json`. Any other has the caption that follows it, **Figure N.** and a paragraph.
    A picture with neither is left as it is.

    Args:
        notebook: changed in place: the metadata of its outputs get `{"image/png": {"alt": ...}}`.
        figures: folder of the saved figures.
    """
    for k, cell in enumerate(notebook.cells):
        pictures = list(pictures_of(cell))
        if not pictures:
            continue
        texts = [alternative_text(figures / f"{name}.json") for name in saved_figures(cell)]
        texts += [None] * (len(pictures) - len(texts))
        for output, text in zip(pictures, texts, strict=False):
            if text := text or caption_below(notebook.cells[k + 1 :]):
                output.metadata[PNG] = {**output.metadata.get(PNG, {}), "alt": text}


def pictures_of(cell: NotebookNode) -> Iterator[NotebookNode]:
    """The outputs of a cell that hold a picture."""
    for output in cell.get("outputs", []):
        if PNG in output.get("data", {}):
            yield output


def saved_figures(cell: NotebookNode) -> list[str]:
    """The names under which a cell saves its figures, in order."""
    calls = [node for node in ast.walk(syntax(cell)) if isinstance(node, ast.Call)]
    calls = [call for call in calls if ast.unparse(call.func).split(".")[-1] == "save_figure"]
    calls.sort(key=lambda call: call.lineno)
    return [call.args[1].value for call in calls if isinstance(call.args[1], ast.Constant)]


def alternative_text(record: Path) -> str | None:
    """The alternative text that `save_figure` wrote, if it did."""
    try:
        return json.loads(record.read_text(encoding="utf-8"))["alt"]
    except (OSError, ValueError, KeyError):
        return None


def caption_below(cells: list[NotebookNode]) -> str | None:
    """The first caption in the text that follows, as plain text."""
    for cell in cells:
        if cell.cell_type != "markdown":
            return None
        if found := CAPTION.search(cell.source):
            number, text = found.groups()
            return f"{number}. {plain_text(text)}"
    return None


def plain_text(markdown: str) -> str:
    """Markdown and its formulas without the marks, in one line."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", markdown)
    text = re.sub(r"\{,\}(?=\d)", ",", text)  # the comma of 150{,}000
    text = re.sub(r"\\[,;]", " ", re.sub(r"[*`$]", "", text))
    text = re.sub(r"\\([A-Za-z]+)", r"\1", text)
    return " ".join(text.replace("{", "").replace("}", "").split())
