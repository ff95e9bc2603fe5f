"""The head of a tutorial page: where and when it ran, and its description.

* ``scraper`` is called by Sphinx-Gallery after every cell. It draws nothing; it
  writes where the script runs into ``plot_x.ran_on.json`` beside the generated page.
* ``forget_other_machines`` makes what ran elsewhere, or with another torch, run again.
* ``add_head`` puts the machines and the running time under the page's title, and uses
  the first paragraph as the description that search engines and messengers show.
"""

import json
import re
from pathlib import Path

from docutils import nodes
from machine import HARDWARE, RAN_ON, describe, this_machine
from sphinx.util import logging

logger = logging.getLogger(__name__)

TIME = r"\((\d+) minutes ([\d.]+) seconds\)"  # as Sphinx-Gallery writes it


def scraper(block, block_vars, gallery_conf):
    """Sphinx-Gallery image scraper that records where the script ran."""
    path = Path(block_vars["target_file"]).with_suffix(RAN_ON)
    path.write_text(json.dumps(this_machine(), indent=2) + "\n", encoding="utf-8")
    return ""


def executes(app):
    """Whether this build runs scripts."""
    return str(app.config.sphinx_gallery_conf["plot_gallery"]) == "True"


def forget_other_machines(app):
    """Make scripts whose outputs are of another machine or torch run again."""
    here = this_machine() if executes(app) else None
    for ran_on in (
        Path(app.srcdir, "auto_tutorials").rglob(f"*{RAN_ON}") if here else ()
    ):
        there = json.loads(ran_on.read_text(encoding="utf-8"))
        if any(there.get(key, "") != here[key] for key in (*HARDWARE, "torch")):
            checksum = ran_on.with_name(ran_on.name.removesuffix(RAN_ON) + ".py.md5")
            checksum.unlink(missing_ok=True)


def _line(title, text):
    return nodes.line("", "", nodes.strong("", title), nodes.Text(text))


def add_head(app, doctree):
    docname = app.env.docname
    source = Path(app.srcdir, f"{docname}.py")
    if not (docname.startswith("auto_tutorials/") and source.exists()):
        return

    title = next(doctree.findall(nodes.title))
    section = title.parent
    first = next(n for n in section.children if isinstance(n, nodes.paragraph))
    description = " ".join(first.astext().split())
    for key, name in [("name", "description"), ("property", "og:description")]:
        doctree.insert(0, nodes.meta(**{key: name, "content": description}))

    head = nodes.line_block(classes=["ran-on"])
    elements = doctree.findall(nodes.Element)
    timing = next((e for e in elements if "sphx-glr-timing" in e["classes"]), None)
    if timing is not None:
        minutes, rest = re.search(TIME, timing.astext()).groups()
        machine = json.loads(source.with_suffix(RAN_ON).read_text(encoding="utf-8"))
        seconds = 60 * int(minutes) + float(rest)
        head += _line("This page ran on ", f"{describe(machine)}, in {seconds:.1f} s.")
    for text, seconds, outdated, cells in doctree["machines"]:
        head += _line("Recorded on ", f"{text}, in {seconds:.1f} s.")
        if outdated:
            head += _line(
                "Earlier code: ",
                f"{outdated} of {cells} code cells have changed since that recording. "
                "Their recorded outputs are not shown; the others are those of the "
                "earlier code.",
            )
    if not head.children:
        head += _line("Not run: ", "this page was built without running its code.")
    section.insert(section.index(title) + 1, head)

    wanted = re.search(
        app.config.sphinx_gallery_conf["filename_pattern"], f"{docname}.py"
    )
    if timing is None and executes(app) and wanted:
        logger.warning(
            "the tutorial did not run: 'make html' runs it", location=docname
        )


def setup(app):
    app.connect("builder-inited", forget_other_machines, priority=100)
    app.connect("doctree-read", add_head)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
