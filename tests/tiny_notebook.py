"""Tiny notebooks, written by tests for the tests of what runs and checks notebooks."""

from pathlib import Path

from nbformat import v4, write

PARAMETERS = "n = 3\nrate = 0.5"
CHECK = (
    "from paperlib.parameters import check_parameters, positive, positive_int\n"
    "check_parameters(globals(), n=positive_int, rate=positive)"
)


def write_notebook(path: Path, *cells: str, parameters: str | None = None) -> Path:
    """A notebook of code cells; a cell that starts with "# checked" gets nbval's tag."""
    notebook = v4.new_notebook(cells=[v4.new_markdown_cell("# A tiny notebook")])
    if parameters is not None:
        notebook.cells.append(v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    for source in cells:
        tags = {"tags": ["nbval-check-output"]} if source.startswith("# checked") else {}
        notebook.cells.append(v4.new_code_cell(source, metadata=tags))
    path.parent.mkdir(parents=True, exist_ok=True)
    write(notebook, path)
    return path
