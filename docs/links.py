"""Links of the repository's own pages, where the book has something else or nothing."""

import re
from pathlib import Path

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([\w./-]+)\)")


def mend(app, docname, source):
    """Links to the README lead to the front page; a file that the book leaves out is only named."""
    path = Path(app.env.doc2path(docname))
    if path.suffix != ".md":
        return

    def replace(link):
        text, target = link.groups()
        if target == "README.md":
            return f"[{text}](index.md)"
        return link[0] if (path.parent / target).exists() else text

    source[0] = LINK.sub(replace, source[0])


def setup(app):
    """Tells Sphinx."""
    app.connect("source-read", mend)
    return {"parallel_read_safe": True}
