"""Fold the code of a cell that draws a figure behind one line.

Drawing is not the lesson. The code stays in the page: search finds it, the keyboard
opens it, the copy button copies it, print shows it (see site.css).
"""

from docutils import nodes

import runner
from _ext.gallery import code_cells, tutorial_of

OPEN = '<details class="figure-code"><summary>Code of this figure</summary>'


def fold(app, doctree):
    if not tutorial_of(app.env.docname):
        return
    for block, _ in code_cells(doctree):
        if runner.draws(block.astext()):
            at = block.parent.index(block)
            block.parent.insert(at + 1, nodes.raw("", "</details>", format="html"))
            block.parent.insert(at, nodes.raw("", OPEN, format="html"))


def setup(app):
    app.connect("doctree-read", fold, priority=800)  # after the recordings
    return {"parallel_read_safe": True, "parallel_write_safe": True}
