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
from machine import describe, this_machine
from recording_files import HARDWARE, write_text
from sphinx.util import logging

logger = logging.getLogger(__name__)

RAN_ON = ".ran_on.json"


def scraper(block, block_vars, gallery_conf):
    """Sphinx-Gallery image scraper that records where the script ran."""
    path = Path(block_vars["target_file"]).with_suffix(RAN_ON)
    write_text(path, json.dumps(this_machine(), indent=2) + "\n")
    return ""


def executes(app):
    """Whether this build runs scripts."""
    return str(app.config.sphinx_gallery_conf["plot_gallery"]) == "True"


def where_it_ran(app, docname=None):
    """The machine on which a page was made, by default the page that is being read."""
    path = Path(app.srcdir, f"{docname or app.env.docname}{RAN_ON}")
    return json.loads(path.read_text(encoding="utf-8"))


def running_time(doctree):
    """Seconds that a page's script took, as the page says; None if it did not run."""
    for element in doctree.findall(nodes.Element):
        if "sphx-glr-timing" in element["classes"]:
            minutes, seconds = re.findall(r"[\d.]+", element.astext())[:2]
            return 60 * int(minutes) + float(seconds)
    return None


def forget_other_machines(app):
    """Make scripts whose outputs are of another machine or torch run again."""
    if not executes(app):
        return
    here = this_machine()
    for ran_on in Path(app.srcdir, "auto_tutorials").rglob(f"plot_*{RAN_ON}"):
        there = json.loads(ran_on.read_text(encoding="utf-8"))
        if any(there.get(key, "") != here[key] for key in (*HARDWARE, "torch")):
            checksum = ran_on.with_name(ran_on.name.removesuffix(RAN_ON) + ".py.md5")
            checksum.unlink(missing_ok=True)


def _line(title, text):
    return nodes.line("", "", nodes.strong("", title), nodes.Text(text))


def add_head(app, doctree):
    docname = app.env.docname
    if not Path(app.srcdir, f"{docname}.py").exists():
        return

    title = next(doctree.findall(nodes.title))
    section = title.parent
    first = next(n for n in section.children if isinstance(n, nodes.paragraph))
    description = " ".join(first.astext().split())
    for key, name in [("name", "description"), ("property", "og:description")]:
        doctree.insert(0, nodes.meta(**{key: name, "content": description}))

    head = nodes.line_block(classes=["ran-on"])
    seconds = running_time(doctree)
    if executes(app) and seconds is not None:
        where = describe(where_it_ran(app))
        head += _line("This page ran on ", f"{where}, in {seconds:.1f} s.")
    else:
        head += _line("Not run: ", "this page was built without running its code.")
    for where, recorded_seconds, changed in doctree["machines"]:
        head += _line("Recorded on ", f"{where}, in {recorded_seconds:.1f} s.")
        if changed:
            cells = "1 code cell has" if changed == 1 else f"{changed} code cells have"
            head += _line(
                "Earlier code: ",
                f"{cells} changed since that recording. What is shown of it was made "
                "by the earlier code.",
            )
    section.insert(section.index(title) + 1, head)

    pattern = app.config.sphinx_gallery_conf["filename_pattern"]
    if seconds is None and executes(app) and re.search(pattern, f"{docname}.py"):
        logger.warning(
            "the tutorial did not run: 'make html' runs it", location=docname
        )


def setup(app):
    app.connect("builder-inited", forget_other_machines, priority=102)
    app.connect("doctree-read", add_head)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
