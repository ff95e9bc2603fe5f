"""Figures of the site: one look, SVG that follows light and dark, alternative text.

* ``set_style`` gives all figures one look. A script need not style anything.
* ``scraper`` saves every open figure as SVG whose text stays text. Ink is the
  reader's text color: the SVG answers the color scheme of the page around it.

The author describes a figure with ``fig.set_label("what it shows")``. The text
becomes the alternative text on the page and the ``<title>`` inside the SVG.
"""

import io
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
from sphinx.errors import ExtensionError

FIGURE = "dark-light tutorial-figure"  # dark-light: the theme leaves it as it is
INK_LIGHT, INK_DARK = "#1f2328", "#e6edf3"

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
        rst += f"\n.. image:: /{source}\n   :alt: {alt}\n   :class: {FIGURE}\n"
    plt.close("all")
    return rst


def _svg(figure, alt):
    buffer = io.StringIO()
    metadata = {"Title": alt, "Date": None, "Creator": None}
    figure.savefig(buffer, format="svg", metadata=metadata)
    svg = buffer.getvalue().replace(INK_LIGHT, "currentColor")
    return svg.replace("<defs>", _THEME + "<defs>", 1)
