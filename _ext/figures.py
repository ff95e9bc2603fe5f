"""Figures of a build: saved as SVG by the runner, and noted beside the page.

``plot_x.ran.json`` beside a generated page says on which machine its script ran, and
which figures it drew, in order.
"""

import json
from pathlib import Path

from sphinx.errors import ExtensionError

import runner
from _ext.gallery import generated

CLASSES = "dark-light tutorial-figure"  # dark-light: the theme leaves it as it is


def reset(gallery_conf, fname, when):
    """Sphinx-Gallery reset hook: the site's look, and a fresh note before each page."""
    runner.set_style()
    if fname and when == "before":
        _write(generated(fname), {"machine": runner.this_machine(), "figures": []})


def scraper(block, block_vars, gallery_conf):
    """Save the open figures of a cell; return the rST that shows them.

    Raises ExtensionError, with file and line, for a figure without ``set_label``.
    """
    try:
        figures = runner.take_figures(f"{block_vars['src_file']}:{block.lineno}")
    except ValueError as problem:
        raise ExtensionError(str(problem)) from None
    rst, ran = "", read(block_vars["target_file"])
    for svg, alt in figures:
        path = Path(next(block_vars["image_path_iterator"])).with_suffix(".svg")
        path.write_text(svg, encoding="utf-8")
        source = path.relative_to(gallery_conf["src_dir"]).as_posix()
        ran["figures"].append(["/" + source, alt])
        rst += f"\n.. image:: /{source}\n   :alt: {alt}\n   :class: {CLASSES}\n"
    _write(block_vars["target_file"], ran)
    return rst


def read(script):
    """What is noted of a generated page: its machine and its figures."""
    return json.loads(Path(script).with_suffix(".ran.json").read_text(encoding="utf-8"))


def _write(script, ran):
    path = Path(script).with_suffix(".ran.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ran, indent=1) + "\n", encoding="utf-8")
