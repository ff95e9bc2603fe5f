"""A recorded notebook as readers get it: see ``gallery.prepare_notebook``.

Its figures come as PNG, too: JupyterLab shows an SVG only in a notebook that its user
has declared trusted.
"""

import base64
import copy
from pathlib import Path

import nbformat
from resvg_py import svg_to_bytes

import runner
from _ext import gallery

FOLDER = Path("_build", "notebooks")


def png(svg):
    """A figure's SVG as PNG, in dark ink on white, with twice its pixels."""
    svg = svg.replace("currentColor", runner.INK_LIGHT)
    return bytes(svg_to_bytes(svg_string=svg, background="white", zoom=2, dpi=96))


def write(app, path):
    """Write the recording at path for readers; its place below the sources."""
    notebook = copy.deepcopy(app.recordings[path][2])
    gallery.prepare_notebook(notebook, app.config.html_baseurl.rstrip("/"))
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if figure := output.get("data", {}).get("image/svg+xml"):
                output.data["image/png"] = base64.b64encode(png(figure)).decode()
    place = FOLDER / path.relative_to(runner.RECORDINGS)
    target = Path(app.srcdir, place)
    target.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, target)
    return place.as_posix()
