"""Configuration of the book; `make book` copies what it is made of beside this file."""

import sys
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from cards import write_cards  # noqa: E402 - beside this file
from reference import write_reference  # noqa: E402

PROJECT = tomllib.loads((HERE / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = PROJECT["name"]
release = PROJECT["version"]
author = "paperlib contributors"
copyright = f"{author}; MIT licence"
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",  # MathJax beside the pages: nothing is fetched when they are read
    # Beside this file.
    "links",
    "pictures",
    "reference",
]
exclude_patterns = ["README.md"]  # is the front page, included in index.md

# A page that others link to needs no place in the table of contents.
suppress_warnings = ["toc.not_included"]

# Notebooks as they were committed.
nb_execution_mode = "off"
nb_ipywidgets_js = {}
myst_enable_extensions = ["amsmath", "colon_fence", "dollarmath"]
myst_heading_anchors = 3

# The reference: Google docstrings; what stands in single backticks is a name or code.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_use_unqualified_type_names = True
add_module_names = False

html_theme = "sphinx_book_theme"
html_title = "A law of data reconstruction"
html_static_path = ["_static"]
html_css_files = ["book.css"]
html_show_sphinx = False
html_favicon = "_static/icon.svg"
html_context = {"default_mode": "auto"}  # light or dark as the reader's system is
html_theme_options = {
    "show_navbar_depth": 1,
    "home_page_in_toc": True,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],
    "show_toc_level": 2,
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}

write_reference(HERE)
write_cards(HERE)
