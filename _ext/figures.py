"""Figures of the site: one look, SVG that follows light and dark, alternative text.

* ``set_style`` gives all figures one look. A script need not style anything.
* ``scraper`` saves every open figure as SVG whose text stays text. Ink is the
  reader's text color: the SVG answers the color scheme of the page around it.
* ``.. tutorial-figure:: basics/plot_x 1`` shows a tutorial's figure on another page.

The author describes a figure with ``fig.set_label("what it shows")``. The text
becomes the alternative text on the page and the ``<title>`` inside the SVG.
"""

import io
import json
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import matplotlib.pyplot as plt
from docutils import nodes
from page_head import RAN_ON, describe
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

INK_LIGHT, INK_DARK = "#1f2328", "#e6edf3"
CLASSES = "dark-light tutorial-figure"  # dark-light: the theme leaves it as it is

# Dark enough for white, bright enough for black, apart for color-blind eyes.
COLORS = ["#1b7fc4", "#d55e00", "#009e73", "#b5589a", "#8c6d00", "#6e7781"]

STYLE = {
    "figure.figsize": (5.6, 3.8),
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.prop_cycle": mpl.cycler(color=COLORS),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "many models, one call",  # equal figures give equal files
} | dict.fromkeys(
    [
        "text.color",
        "axes.labelcolor",
        "axes.edgecolor",
        "xtick.color",
        "ytick.color",
        "grid.color",
    ],
    INK_LIGHT,
)

_THEME = (
    f"<style>svg {{ color: {INK_LIGHT} }} "
    f"@media (prefers-color-scheme: dark) {{ svg {{ color: {INK_DARK} }} }}</style>"
)


def set_style(gallery_conf, fname):
    """Sphinx-Gallery reset hook: the site's look, after matplotlib's defaults."""
    mpl.rcParams.update(STYLE)


def scraper(block, block_vars, gallery_conf):
    """Save the open figures of a cell; return the rST that shows them.

    Raises ExtensionError, with file and line, for a figure without ``set_label``.
    """
    rst = ""
    for number in plt.get_fignums():
        figure = plt.figure(number)
        alt = " ".join(figure.get_label().split())
        if not alt:
            plt.close("all")
            raise ExtensionError(
                f"{block_vars['src_file']}:{block.lineno}: this cell draws a figure "
                "without alternative text. Say what it shows: fig.set_label('...')"
            )
        path = Path(next(block_vars["image_path_iterator"])).with_suffix(".svg")
        path.write_text(_svg(figure, alt), encoding="utf-8")
        source = path.relative_to(gallery_conf["src_dir"]).as_posix()
        rst += f"\n.. image:: /{source}\n   :alt: {alt}\n   :class: {CLASSES}\n"
    plt.close("all")
    return rst


def _svg(figure, alt):
    buffer = io.StringIO()
    metadata = {"Title": alt, "Date": None, "Creator": None}
    figure.savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue().replace(INK_LIGHT, "currentColor")
    return svg.replace("<defs>", _THEME + "<defs>", 1)


class TutorialFigure(SphinxDirective):
    """``.. tutorial-figure:: basics/plot_x 1``: a tutorial's figure, with a link to it.

    Where the tutorial has not run, a sentence says how to run it.
    """

    required_arguments = 2

    def run(self):
        name, number = self.arguments
        section, stem = name.split("/")
        page = f"/auto_tutorials/{name}"
        image = f"auto_tutorials/{section}/images/sphx_glr_{stem}_{int(number):03}.svg"
        path = Path(self.env.srcdir, image)
        self.env.note_dependency(image)
        if not path.exists():
            text = f"The figure of :doc:`{page}` appears here after ``make html``."
            return self.parse_text_to_nodes(text)
        alt = ElementTree.parse(path).findtext("{http://www.w3.org/2000/svg}title")
        figure = nodes.figure()
        figure += nodes.image(uri=f"/{image}", alt=alt, classes=CLASSES.split())
        ran_on = Path(self.env.srcdir, f"{page[1:]}{RAN_ON}")
        machine = json.loads(ran_on.read_text(encoding="utf-8"))
        caption, _ = self.parse_inline(
            f"From the run of :doc:`{page}` on {describe(machine)}."
        )
        figure += nodes.caption("", "", *caption)
        return [figure]


def setup(app):
    app.add_directive("tutorial-figure", TutorialFigure)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
