"""Alternative text reaches the pictures of a notebook: the figure's own, else its caption."""

import json

import pytest
from nbformat import v4

from paperlib.notebook_pictures import describe_pictures, pictures_of, plain_text, saved_figures


def picture():
    return v4.new_output("display_data", data={"image/png": "iVBORw0KGgo=", "text/plain": "Figure"})


def drawn(source, pictures=1):
    return v4.new_code_cell(source, outputs=[picture() for _ in range(pictures)])


def texts(notebook):
    outputs = [output for cell in notebook.cells for output in pictures_of(cell)]
    return [output.metadata.get("image/png", {}).get("alt") for output in outputs]


@pytest.fixture
def figures(tmp_path):
    for name in ("first", "second"):
        (tmp_path / f"{name}.json").write_text(json.dumps({"alt": f"Line plot, the {name}."}))
    return tmp_path


def test_a_saved_figure_has_its_own_text(figures):
    source = "save_figure(figure, 'first', data=table)\npl.save_figure(other, 'second', data=[1])"
    notebook = v4.new_notebook(cells=[drawn(source, 2)])
    describe_pictures(notebook, figures)
    assert texts(notebook) == ["Line plot, the first.", "Line plot, the second."]


def test_another_has_the_caption_below_it(figures):
    caption = "**Figure 2.** Curves of *all* sizes,\n$d = 64$ and $150{,}000$.\n\nMore."
    cells = [drawn("axes.plot([1])"), v4.new_markdown_cell(caption), drawn("axes.plot([2])")]
    notebook = v4.new_notebook(cells=cells)
    describe_pictures(notebook, figures)
    assert texts(notebook) == ["Figure 2. Curves of all sizes, d = 64 and 150,000.", None]


def test_a_caption_beyond_the_next_code_is_of_another_picture(figures):
    cells = [drawn("a"), v4.new_code_cell("b"), v4.new_markdown_cell("**Figure 1.** Not a.")]
    notebook = v4.new_notebook(cells=cells)
    describe_pictures(notebook, figures)
    assert texts(notebook) == [None]


def test_without_a_record_the_caption_stands_in(tmp_path):
    cells = [drawn("save_figure(f, 'lost', data=t)"), v4.new_markdown_cell("**Figure 1.** Found.")]
    notebook = v4.new_notebook(cells=cells)
    describe_pictures(notebook, tmp_path)
    assert texts(notebook) == ["Figure 1. Found."]


def test_other_metadata_stay(figures):
    notebook = v4.new_notebook(cells=[drawn("save_figure(figure, 'first', data=table)")])
    (output,) = notebook.cells[0].outputs
    output.metadata = {"needs_background": "light", "image/png": {"width": 300}}
    describe_pictures(notebook, figures)
    assert output.metadata["needs_background"] == "light"
    assert output.metadata["image/png"] == {"width": 300, "alt": "Line plot, the first."}


def test_figures_are_named_in_the_order_of_the_text():
    source = "paths = keep(save_figure(f, 'a', data=t))\nsave_figure(f, name, data=t)"
    assert saved_figures(v4.new_code_cell(source)) == ["a"]


def test_formulas_and_links_become_words():
    markdown = r"From $p = d\,n$ on, see [chapter 1](01.ipynb), at $\hat n \ge 2$."
    assert plain_text(markdown) == "From p = d n on, see chapter 1, at hat n ge 2."
