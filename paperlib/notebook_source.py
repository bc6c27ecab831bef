"""A notebook read as source: its parameters, what they may be, and its outputs made clean."""

import ast
import re
from collections.abc import Mapping

import nbformat
from IPython.core.inputtransformer2 import TransformerManager
from nbformat import NotebookNode

from paperlib.parameters import assigned_names

KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}

LANGUAGE = {
    "codemirror_mode": {"name": "ipython", "version": 3},
    "file_extension": ".py",
    "mimetype": "text/x-python",
    "name": "python",
    "nbconvert_exporter": "python",
    "pygments_lexer": "ipython3",
}


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells that have something to run."""
    return [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]


def syntax(cell: NotebookNode) -> ast.Module:
    """The syntax tree of a code cell, with IPython's magics turned into calls."""
    return ast.parse(TransformerManager().transform_cell(cell.source))


def declared_parameters(notebook: NotebookNode) -> dict[str, object]:
    """Names and values in the cell tagged ``parameters``, in order; none without such a cell.

    Raises:
        ValueError: if there are several such cells, or if one holds anything but assignments of
            literals: papermill replaces values after the cell ran, so that a value derived from
            another would keep its old value.
    """
    cells = [cell for cell in code_cells(notebook) if "parameters" in tags(cell)]
    if len(cells) > 1:
        raise ValueError(f"expected one cell tagged 'parameters', got {len(cells)}")
    values = {}
    for statement in syntax(cells[0]).body if cells else []:
        names = assigned_names(ast.unparse(statement))
        try:
            value = ast.literal_eval(statement.value)
        except (AttributeError, ValueError):
            names = []
        if len(names) != 1:
            raise ValueError(
                "the cell tagged 'parameters': expected NAME = LITERAL in every line, "
                f"got {ast.unparse(statement)!r}"
            )
        values[names[0]] = value
    return values


def find_check(notebook: NotebookNode) -> ast.Expr | None:
    """The notebook's call of ``check_parameters``, or None."""
    for cell in code_cells(notebook):
        for statement in syntax(cell).body:
            match statement:
                case ast.Expr(value=ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name))):
                    if name == "check_parameters":
                        return statement
    return None


def check_values(notebook: NotebookNode, parameters: Mapping[str, object]) -> None:
    """Check ``parameters`` as the notebook itself would, without running it.

    Names are compared with the cell tagged ``parameters``. Values go through the notebook's own
    call of ``check_parameters``: its imports and that call are evaluated, nothing else.

    Raises:
        ValueError: if a name is unknown, or a value not as the notebook wants it.
    """
    declared = declared_parameters(notebook)
    unknown = [name for name in parameters if name not in declared]
    if unknown:
        raise ValueError(
            f"expected parameters among {', '.join(declared) or '(none)'}, "
            f"got {', '.join(map(str, unknown))}"
        )
    check = find_check(notebook)
    if check is None:
        return
    imports = []
    for cell in code_cells(notebook):
        for statement in syntax(cell).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                imports.append(statement)
    module = ast.Module(body=[*imports, check], type_ignores=[])
    namespace = {"__name__": "__main__", **declared, **parameters}
    exec(compile(module, "<check_parameters>", "exec"), namespace)


def normalised(executed: NotebookNode) -> NotebookNode:
    """An executed notebook as it is committed: its cells and outputs, no trace of the run.

    Kernel and language are set to plain Python 3; times, paths and versions that papermill and
    Jupyter leave in the metadata are dropped, and so are progress bars, which the pages that show
    committed notebooks could only draw as they were at their start.

    Raises:
        ValueError: if the code cells were not run once each, from top to bottom, or if papermill
            injected parameters.
    """
    notebook = nbformat.from_dict(executed)
    counts = [cell.execution_count for cell in code_cells(notebook)]
    if counts != list(range(1, len(counts) + 1)):
        raise ValueError(f"expected execution counts 1, 2, ..., {len(counts)}, got {counts}")
    if any("injected-parameters" in tags(cell) for cell in notebook.cells):
        raise ValueError("expected a run at the notebook's own parameters, got injected ones")
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": LANGUAGE})
    for cell in notebook.cells:
        kept = {"tags": tags(cell)} if tags(cell) else {}
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_progress_bar(output)]
    return notebook


def _is_progress_bar(output: NotebookNode) -> bool:
    """Whether an output is tqdm's widget, known by the percentage and bar in its text."""
    data = output.get("data", {})
    bar = re.match(r"(.*: )?\s*\d+%\|", data.get("text/plain", ""))
    return "application/vnd.jupyter.widget-view+json" in data and bar is not None
