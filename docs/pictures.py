"""Alternative text for the pictures that notebooks drew, which myst-nb leaves without."""

import hashlib
from base64 import b64decode
from pathlib import Path

import nbformat
from docutils import nodes

from paperlib.notebook_pictures import PNG, describe_pictures, pictures_of


def describe(app, doctree):
    """Gives every picture of a notebook the text kept with its output."""
    path = Path(app.env.doc2path(app.env.docname))
    if path.suffix != ".ipynb":
        return
    notebook = nbformat.read(path, as_version=4)
    describe_pictures(notebook, Path(app.srcdir) / "figures")
    outputs = [output for cell in notebook.cells for output in pictures_of(cell)]
    # myst-nb names a picture after its content.
    texts = {
        hashlib.sha256(b64decode(output.data[PNG])).hexdigest(): output.metadata[PNG]["alt"]
        for output in outputs
        if "alt" in output.metadata.get(PNG, {})
    }
    for picture in doctree.findall(nodes.image):
        text = texts.get(Path(picture["uri"]).stem)
        if text:
            picture["alt"] = text


def setup(app):
    """Tells Sphinx."""
    app.connect("doctree-read", describe)
    return {"parallel_read_safe": True}
