"""The head of a tutorial's page: where and when it ran.

Outputs of another machine, or of another torch, run again by themselves.
"""

import re
from pathlib import Path

from docutils import nodes
from sphinx import addnodes
from sphinx.util import logging

import runner
from _ext import downloads, figures, gallery

logger = logging.getLogger(__name__)


def forget_other_machines(app):
    """Make scripts whose outputs are of another machine or torch run again."""
    if not gallery.executes(app):
        return
    here = runner.this_machine()
    for note in Path(app.srcdir, gallery.GENERATED).rglob("plot_*.ran.json"):
        script = note.with_name(note.name.replace(".ran.json", ".py"))
        there = figures.read(script)["machine"]
        same = runner.hardware(there) == runner.hardware(here)
        if not same or there["torch"] != here["torch"]:
            gallery.run_again(script)


def line(title, *content):
    return nodes.line("", "", nodes.strong("", title), *content)


def add_head(app, doctree):
    tutorial = gallery.tutorial_of(app.env.docname)
    if not tutorial:
        return
    title = next(doctree.findall(nodes.title))
    section = title.parent

    head = nodes.line_block(classes=["ran-on"])
    seconds = gallery.running_time(doctree)
    if gallery.executes(app) and seconds is not None:
        ran = figures.read(Path(app.srcdir, f"{app.env.docname}.py"))
        where = f"{runner.describe(ran['machine'])}, in {seconds:.3g} s."
        head += line("This page ran on ", nodes.Text(where))
    elif not doctree["recorded"]:
        text = "this page was built without running its code."
        head += line("Not run: ", nodes.Text(text))
    for path, machine, recorded_seconds, current, total in doctree["recorded"]:
        where = f"{runner.describe(machine)}, in {recorded_seconds:.1f} s"
        if current == total:
            name = nodes.Text("the notebook with these outputs")
            place = downloads.write(app, runner.ROOT / path)
            link = addnodes.download_reference("", "", name, reftarget=f"/{place}")
            where = [nodes.Text(where + " ("), link, nodes.Text(").")]
        else:
            changed = (
                f"; its code has changed since, from cell {current + 1} of {total} on."
            )
            where = [nodes.Text(where + changed)]
        head += line("Recorded on ", *where)
    section.insert(section.index(title) + 1, head)

    wanted = app.config.sphinx_gallery_conf["filename_pattern"]
    executes = gallery.executes(app) and re.search(wanted, f"/{app.env.docname}.py")
    if seconds is None and executes:
        logger.warning(
            "the tutorial did not run: 'make html' runs it", location=app.env.docname
        )


def setup(app):
    app.connect("builder-inited", forget_other_machines, priority=102)
    # After the recordings, before Sphinx collects what can be downloaded.
    app.connect("doctree-read", add_head, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
