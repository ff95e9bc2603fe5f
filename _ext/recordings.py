"""Outputs of several machines on one page: recorded by one build, joined by the next.

``make record`` writes what this machine's run produced (see ``recording_files.py``).
``make html`` puts the recorded outputs under the code cells, beside those of this
build. An output belongs to the *code* of its cell: prose may change, an edited cell
loses its recorded outputs. Where all machines agree, one output stands; where they
differ, each machine has a tab, accelerators first.
"""

import difflib
import re
import textwrap
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from docutils import nodes
from figures import FIGURE
from machine import describe, short_name, slug, this_machine
from page_head import executes, running_time, where_it_ran
from recording_files import (
    MACHINE_NAME,
    SVG,
    RecordingError,
    code_hash,
    load,
    pack,
    refuse_other_hardware,
    save_tutorial,
    sha256,
)
from sphinx.errors import ExtensionError
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective
from sphinx_design.shared import create_component

logger = logging.getLogger(__name__)

OWN = "this-build"

# A code cell in generated rST: its indented code, and what follows up to the next cell.
CELL = r"[^\n]*\n\n\.\. code-block:: Python\n\n((?: {4}[^\n]*\n|[ ]*\n)*)(.*)"


class Source(NamedTuple):
    """One machine's outputs of one page."""

    machine: dict
    name: str  # folder of the recording, or OWN
    outputs: dict  # position of the cell -> list of (kind, content, path)

    def order(self):
        """Accelerators first, then this build, then by name."""
        accelerator = self.machine["accelerator"] is None
        return accelerator, self.name != OWN, short_name(self.machine), self.name


def root_of(app):
    return Path(app.srcdir, "recordings")


def tutorial_of(docname):
    """basics/plot_x of auto_tutorials/basics/plot_x, else None."""
    found = re.fullmatch(r"auto_tutorials/([^/]+/plot_[^/]+)", docname)
    return found and found[1]


# --- a build that joins -----------------------------------------------------------


def read_all(app):
    """Load and check the recordings before any script runs."""
    try:
        # The machine that records need not have a sound recording: it makes a new one.
        app.recordings = load(root_of(app), without=record_name(app))
    except RecordingError as problem:
        raise ExtensionError(str(problem)) from None


def outdated(app, env, added, changed, removed):
    """Pages to read again because a recording came, went or changed."""
    state = {"executes": executes(app)}
    for name, tutorials in app.recordings.items():
        for tutorial in tutorials:
            content = (root_of(app) / name / tutorial / "recording.json").read_bytes()
            state[tutorial, name] = sha256(content)
    before = getattr(env, "recordings_state", {})
    env.recordings_state = state
    return env.found_docs if state != before else []


def cells_of_page(app, tutorial):
    """Code cells of a generated page, from its rST: (hash, paths of its figures)."""
    page = Path(app.srcdir, "auto_tutorials", f"{tutorial}.rst")
    parts = page.read_text(encoding="utf-8").split(
        ".. GENERATED FROM PYTHON SOURCE LINES"
    )
    cells = []
    for part in parts[1:]:
        found = re.match(CELL, part, re.DOTALL)
        if found:
            figures = re.findall(r"^\.\. image:: /(.*\.svg)$", found[2], re.MULTILINE)
            paths = [Path(app.srcdir, figure) for figure in figures]
            cells.append((code_hash(textwrap.dedent(found[1])), paths))
    return cells


def matching(recording, hashes):
    """Recorded outputs by position in the page, of the cells whose code is the same.

    Also the number of cells that differ: edited, added, taken away or moved.
    """
    then = [cell["code"] for cell in recording["cells"]]
    blocks = difflib.SequenceMatcher(None, then, hashes, False).get_matching_blocks()
    pairs = [(b.a + i, b.b + i) for b in blocks for i in range(b.size)]
    outputs = {now: recording["cells"][was]["outputs"] for was, now in pairs}
    return outputs, max(len(then), len(hashes)) - len(pairs)


def recorded_sources(app, tutorial, hashes):
    """Source of each machine that recorded the tutorial, with its changed cells."""
    for name, tutorials in app.recordings.items():
        if tutorial in tutorials:
            outputs, changed = matching(tutorials[tutorial], hashes)
            yield Source(tutorials[tutorial]["machine"], name, outputs), changed


def code_cells(doctree):
    """Code cells of a generated page: (literal block, the output nodes after it)."""
    cells = []
    for block in doctree.findall(nodes.literal_block):
        siblings = block.parent.children
        at = siblings.index(block)
        before = siblings[at - 1] if at else None
        generated = isinstance(before, nodes.comment) and "GENERATED" in before.astext()
        if not generated or block.get("language") != "Python":
            continue
        outputs = []
        for node in siblings[at + 1 :]:
            if not {"sphx-glr-script-out", "tutorial-figure"} & set(node["classes"]):
                break
            outputs.append(node)
        cells.append((block, outputs))
    return cells


def own_outputs(app, outputs):
    """This build's outputs of a cell: (kind, content, path of a figure)."""
    shown = []
    for node in outputs:
        if isinstance(node, nodes.image):
            path = Path(app.srcdir, node["uri"].lstrip("/"))
            shown.append(("figure", path.read_text(encoding="utf-8"), path))
        else:
            shown.append(("text", node.astext() + "\n", None))
    return shown


def output_nodes(app, outputs):
    """The nodes that show outputs. Text and alternative text stay text."""
    shown = []
    for kind, content, path in outputs:
        if kind == "text":
            text = content.removesuffix("\n")
            block = nodes.literal_block(text, text, language="none")
            block["classes"].append("sphx-glr-script-out")
            shown.append(block)
        else:
            uri = "/" + path.relative_to(app.srcdir).as_posix()
            alt = ElementTree.fromstring(content).findtext(f"{SVG}title")
            shown.append(nodes.image(uri=uri, alt=alt, classes=FIGURE.split()))
    return shown


def tab_set(app, entries):
    """Synchronized tabs, from a list of (Source, nodes)."""
    entries = sorted(entries, key=lambda entry: entry[0].order())
    labels = [short_name(source.machine) for source, _ in entries if source.name != OWN]
    items = []
    for source, content in entries:
        label = short_name(source.machine)
        if source.name == OWN:
            label = "This build"
        elif labels.count(label) > 1:
            label += f" ({source.name})"
        tab_label = nodes.rubric(label, label, classes=["sd-tab-label"])
        tab_label["sync_group"], tab_label["sync_id"] = "machine", source.name
        content = content or [nodes.paragraph("", "This machine showed nothing here.")]
        panel = create_component(
            "tab-content", classes=["sd-tab-content"], children=content
        )
        items.append(
            create_component(
                "tab-item", classes=["sd-tab-item"], children=[tab_label, panel]
            )
        )
    return create_component(
        "tab-set", classes=["sd-tab-set", "machines"], children=items
    )


def join(app, doctree):
    """Put the outputs of all machines under each code cell of a tutorial's page."""
    tutorial = tutorial_of(app.env.docname)
    if not tutorial:
        return
    cells = code_cells(doctree)
    hashes = [code_hash(block.astext()) for block, _ in cells]
    sources = []
    doctree["machines"] = []
    for source, changed in recorded_sources(app, tutorial, hashes):
        seconds = app.recordings[source.name][tutorial]["seconds"]
        doctree["machines"].append((describe(source.machine), seconds, changed))
        sources.append(source)
    if executes(app) and running_time(doctree) is not None:
        outputs = {at: own_outputs(app, shown) for at, (_, shown) in enumerate(cells)}
        sources.append(Source(where_it_ran(app), OWN, outputs))

    for position, (block, shown) in enumerate(cells):
        for node in shown:
            block.parent.remove(node)
        having = [source for source in sources if position in source.outputs]
        contents = [[o[:2] for o in source.outputs[position]] for source in having]
        if not any(contents):
            continue
        entries = [(s, output_nodes(app, s.outputs[position])) for s in having]
        agree = len(having) == len(sources) and all(c == contents[0] for c in contents)
        if agree or [source.name for source in having] == [OWN]:
            result = entries[0][1]
        else:
            result = [tab_set(app, entries)]
        at = block.parent.index(block) + 1
        block.parent[at:at] = result


def figures_of(app, tutorial):
    """Figures of a tutorial's page: for each, a list of (Source, output)."""
    cells = cells_of_page(app, tutorial)
    sources = [
        s for s, _ in recorded_sources(app, tutorial, [code for code, _ in cells])
    ]
    if executes(app) and any(paths for _, paths in cells):
        own = {
            at: [("figure", path.read_text(encoding="utf-8"), path) for path in paths]
            for at, (_, paths) in enumerate(cells)
        }
        sources.append(
            Source(where_it_ran(app, f"auto_tutorials/{tutorial}"), OWN, own)
        )
    figures = {}
    for source in sources:
        for at, outputs in source.outputs.items():
            drawn = [output for output in outputs if output[0] == "figure"]
            for index, output in enumerate(drawn):
                figures.setdefault((at, index), []).append((source, output))
    return [figures[key] for key in sorted(figures)]


class TutorialFigure(SphinxDirective):
    """``.. tutorial-figure:: basics/plot_x 1``: a tutorial's figure, with a link to it.

    With a tab for each machine that has it. Where none has, a sentence says how to
    make it.
    """

    required_arguments = 2

    def run(self):
        tutorial, number = self.arguments[0], int(self.arguments[1])
        page = f"/auto_tutorials/{tutorial}"
        self.env.note_dependency(f"{page[1:]}.rst")
        figures = figures_of(self.env.app, tutorial)
        if number > len(figures):
            text = f"The figure of :doc:`{page}` appears here after ``make html``."
            return self.parse_text_to_nodes(text)
        entries = []
        for source, output in figures[number - 1]:
            figure = nodes.figure("", *output_nodes(self.env.app, [output]))
            link, _ = self.parse_inline(f":doc:`{page}`")
            where = nodes.Text(f", on {describe(source.machine)}.")
            figure += nodes.caption("", "", nodes.Text("From "), *link, where)
            entries.append((source, [figure]))
        return entries[0][1] if len(entries) == 1 else [tab_set(self.env.app, entries)]


def recorded_thumbnails(app, doctree):
    """In gallery indexes, a recorded figure stands in for a page that did not run."""
    thumbnail = r"(auto_tutorials/)(\w+)/images/thumb/sphx_glr_(\w+)_thumb\.\w+"
    for image in doctree.findall(nodes.image):
        found = re.search(thumbnail, image["uri"])
        if not found or executes(app):
            continue
        tutorial = f"{found[2]}/{found[3]}"
        app.env.note_dependency(f"auto_tutorials/{tutorial}.rst")
        figures = figures_of(app, tutorial)
        if figures:
            _, (_, _, path) = min(figures[0], key=lambda entry: entry[0].order())
            image["uri"] = "/" + path.relative_to(app.srcdir).as_posix()


# --- a build that records ---------------------------------------------------------


def record_name(app):
    """Name under which this build records; None if it does not."""
    name = app.config.record_as
    return slug(this_machine()) if name == "auto" else name or None


def before_recording(app):
    """Refuse a bad name before anything runs."""
    name = record_name(app)
    app.recorded, app.not_recorded = [], []
    if not name:
        return
    if not MACHINE_NAME.fullmatch(name) or name == OWN:
        raise ExtensionError(f"MACHINE={name}: use small letters, digits and hyphens")
    try:
        refuse_other_hardware(root_of(app), name, this_machine())
    except RecordingError as problem:
        raise ExtensionError(str(problem)) from None


def record(app, doctree):
    """Write what this build's run of a tutorial produced, if ``make record`` asked."""
    tutorial = tutorial_of(app.env.docname)
    seconds = running_time(doctree)
    failed = any(
        b.get("language") == "pytb" for b in doctree.findall(nodes.literal_block)
    )
    if not tutorial or not record_name(app) or seconds is None or failed:
        return  # Sphinx-Gallery reports failures itself
    cells = [
        (code_hash(block.astext()), [output[:2] for output in own_outputs(app, shown)])
        for block, shown in code_cells(doctree)
    ]
    where = where_it_ran(app)
    try:
        save_tutorial(root_of(app), record_name(app), tutorial, where, seconds, cells)
    except RecordingError as problem:
        logger.warning("%s is not recorded: %s", tutorial, problem)
    else:
        app.recorded.append(tutorial)
        logger.info("recorded %s as %s", tutorial, record_name(app))


def after_build(app, exception):
    """Pack the recording, or print the table, if asked."""
    if app.recorded:
        archive = Path(app.outdir).parent / f"{record_name(app)}.tar.gz"
        size = pack(root_of(app), record_name(app), archive)
        logger.info("to carry back: %s (%.0f KiB)", archive, size / 1024)
    if app.config.recordings_table and not exception:
        print_table(app)


def print_table(app):
    """Tutorial by machine: current, cells outdated, missing."""
    words = {None: "missing", 0: "current", 1: "1 cell outdated"}
    rows = [["tutorial", *app.recordings]]
    for tutorial in sorted(filter(None, map(tutorial_of, app.env.found_docs))):
        hashes = [code for code, _ in cells_of_page(app, tutorial)]
        changed = {s.name: n for s, n in recorded_sources(app, tutorial, hashes)}
        states = [changed.get(name) for name in app.recordings]
        rows.append([tutorial, *(words.get(n, f"{n} cells outdated") for n in states)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        print("  ".join(cells).rstrip())
    if not app.recordings:
        print("There are no recordings yet. 'make record' makes those of this machine.")


def setup(app):
    app.add_config_value("record_as", "", "")  # a machine's name, "auto", or "" for no
    app.add_config_value("recordings_table", False, "")
    app.add_directive("tutorial-figure", TutorialFigure)
    app.connect("builder-inited", before_recording, priority=100)
    app.connect("builder-inited", read_all, priority=101)  # both before scripts run
    app.connect("env-get-outdated", outdated)
    # Before Sphinx collects images, and before page_head and tidy.
    app.connect("doctree-read", record, priority=300)
    app.connect("doctree-read", join, priority=301)
    app.connect("doctree-read", recorded_thumbnails, priority=302)
    app.connect("build-finished", after_build)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
