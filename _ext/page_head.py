"""The head of a tutorial's page: on which machines it ran, with what they executed.

A notebook with outputs holds its figures as PNG, too: JupyterLab shows an SVG only in a
notebook that its user has declared trusted.
"""

import base64
import json
from pathlib import Path

from docutils import nodes
from resvg_py import svg_to_bytes
from sphinx import addnodes

import runner
from _ext import gallery, recordings

FOLDER = Path("_build", "notebooks")


def png(svg):
    """A figure's SVG as PNG, in dark ink on white, with twice its pixels."""
    svg = svg.replace("currentColor", runner.INK_LIGHT)
    return bytes(svg_to_bytes(svg_string=svg, background="white", zoom=2, dpi=96))


def write_notebook(app, tutorial, source):
    """Write the page as it is, with the outputs of a source; return its place."""
    cells = recordings.cells_of(tutorial)
    having_code = [number for number, cell in enumerate(cells) if cell.code]
    outputs = dict(zip(having_code, source.outputs, strict=True))
    notebook = runner.notebook(cells, outputs, source.machine, source.seconds)
    gallery.prepare_notebook(notebook, app.config.html_baseurl.rstrip("/"))
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            if figure := output.get("data", {}).get("image/svg+xml"):
                content = base64.b64encode(png("".join(figure)))
                output["data"]["image/png"] = content.decode()
    place = FOLDER / source.name / f"{tutorial}.ipynb"
    target = Path(app.srcdir, place)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook), encoding="utf-8")
    return place.as_posix()


def add_head(app, doctree):
    tutorial = gallery.tutorial_of(app.env.docname)
    if not tutorial:
        return
    head = nodes.line_block(classes=["ran-on"])
    total = len(runner.code_of(recordings.cells_of(tutorial)))
    lines = []
    for source in recordings.recorded(app, tutorial):
        where = f"{runner.describe(source.machine)}, in {source.seconds:.1f} s"
        if source.current == total:
            name = nodes.Text("the notebook with these outputs")
            place = write_notebook(app, tutorial, source)
            link = addnodes.download_reference("", "", name, reftarget=f"/{place}")
            lines.append(["Ran on ", nodes.Text(where + " ("), link, nodes.Text(").")])
        else:
            cell = f"cell {source.current + 1} of {total}"
            changed = nodes.Text(
                f"{where}; its code has changed since, from {cell} on."
            )
            lines.append(["Ran on ", changed])
    text = nodes.Text("this page was built without running its code.")
    for title, *content in lines or [["Not run: ", text]]:
        head += nodes.line("", "", nodes.strong("", title), *content)
    title = next(doctree.findall(nodes.title))
    title.parent.insert(title.parent.index(title) + 1, head)


def setup(app):
    # Before Sphinx collects what can be downloaded.
    app.connect("doctree-read", add_head, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
