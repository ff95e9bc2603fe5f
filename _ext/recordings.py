"""Outputs of several machines on one page: recorded by the runner, joined here.

A recording is an executed notebook (see ``runner.py``). Its outputs stand under the
code cells for as long as a cell and all code before it are the same; what comes after
is not shown. An outdated recording shows nothing where one of its kind, with or without
an accelerator, is current. Where all machines agree, one output stands; where they
differ, each has a tab, accelerators first, of the others the newest first. A machine
that built the page needs no recording of it.
"""

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

import nbformat
from docutils import nodes
from nbformat import ValidationError
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from sphinx_design.shared import create_component

import runner
from _ext import figures, gallery

UNREADABLE = (ValueError, KeyError, AttributeError, TypeError)
OWN = "this-build"
FIGURES = Path("_build", "recorded")  # recorded figures as files, for <img>


class Source(NamedTuple):
    """One machine's outputs of one page."""

    machine: dict
    name: str  # folder of the recording, or OWN
    outputs: list  # for each code cell a list of (kind, content, alternative text)


# --- reading ----------------------------------------------------------------------


def outputs_of(cell, folder):
    """Outputs of a recorded cell. Figures become files below folder."""
    found = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            found.append(("text", output["text"], None))
            continue
        svg, alt = output["data"]["image/svg+xml"], output["data"]["text/plain"]
        path = folder / f"{hashlib.sha256(svg.encode()).hexdigest()[:16]}.svg"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(svg, encoding="utf-8")
        found.append(("figure", svg, (path, alt)))
    return found


def read(path):
    """A recording as (machine, seconds, its code cells, outputs of each).

    Raises ExtensionError if it is damaged, or of a page that is gone.
    """
    name = path.relative_to(runner.ROOT)
    page = runner.TUTORIALS.joinpath(*path.parts[-2:]).with_suffix(".py")
    if not page.exists():
        raise ExtensionError(f"{name} is of a tutorial that is gone: git rm it")
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        machine, seconds = dict(notebook.metadata.machine), notebook.metadata.seconds
        runner.describe(machine)
        cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
        folder = runner.ROOT / FIGURES
        outputs = [outputs_of(cell, folder) for cell in cells]
    except (ValidationError, *UNREADABLE) as problem:
        reason = str(problem).strip().split("\n")[0]
        raise ExtensionError(
            f"{name} is damaged: {type(problem).__name__}: {reason}. Restore it from "
            f"git, or record it again: python runner.py {page.stem}"
        ) from None
    return machine, seconds, notebook, outputs


def read_all(app):
    """Read and check every recording before any script runs."""
    app.recordings = {
        path: read(path) for path in sorted(runner.RECORDINGS.glob("*/*/*.ipynb"))
    }


def outdated(app, env, added, changed, removed):
    """Pages to read again because a recording came, went or changed."""
    state = {str(path): path.read_bytes() for path in app.recordings}
    state = {path: hashlib.sha256(content).digest() for path, content in state.items()}
    state["executes"] = gallery.executes(app)
    before, env.recordings_state = getattr(env, "recordings_state", {}), state
    return env.found_docs if state != before else []


def has_no_accelerator(machine):
    return machine["accelerator"] is None


def recorded(app, tutorial, own=None):
    """Of each recording of a page: path, Source, seconds, current and all cells.

    But for those of the machine that built the page, whose Source is own.
    """
    text = (runner.TUTORIALS / f"{tutorial}.py").read_text(encoding="utf-8")
    cells = runner.split(text)
    total = len(runner.code_of(cells))
    found, current_kinds = [], {has_no_accelerator(own.machine)} if own else set()
    for path, (machine, seconds, notebook, outputs) in app.recordings.items():
        if path.match(f"{tutorial}.ipynb"):
            current = runner.current(notebook, cells)
            source = Source(machine, path.parts[-3], outputs[:current])
            found.append((path, source, seconds, current, total))
            if current == total:
                current_kinds.add(has_no_accelerator(machine))
    here = own and runner.hardware(own.machine)
    for path, source, seconds, current, total in found:
        if current < total and has_no_accelerator(source.machine) in current_kinds:
            source = source._replace(outputs=[])
        if runner.hardware(source.machine) != here:
            yield path, source, seconds, current, total


def in_order(entries):
    """Entries that begin with a Source: accelerators, then this build, then others."""

    def key(entry):
        machine, name, _ = entry[0]
        label = "" if has_no_accelerator(machine) else runner.short_name(machine)
        return has_no_accelerator(machine), name != OWN, label

    newest = sorted(entries, key=lambda entry: entry[0].machine["date"], reverse=True)
    return sorted(newest, key=key)


# --- showing ----------------------------------------------------------------------


def own_outputs(outputs):
    """This build's outputs of a cell, from the nodes that show them."""
    shown = []
    for node in outputs:
        if isinstance(node, nodes.image):
            path = runner.ROOT / node["uri"].lstrip("/")
            svg = path.read_text(encoding="utf-8")
            shown.append(("figure", svg, (path, node["alt"])))
        else:
            shown.append(("text", node.astext() + "\n", None))
    return shown


def image(path, alt):
    """A figure; its size keeps its place on the page free until it is loaded."""
    uri = "/" + path.relative_to(runner.ROOT).as_posix()
    box = re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"', path.read_text())
    width, height = (str(round(float(points) * 4 / 3)) for points in box.groups())
    size = {"width": width, "height": height, "loading": "lazy"}
    return nodes.image(uri=uri, alt=alt, classes=figures.CLASSES.split(), **size)


def output_nodes(outputs):
    """The nodes that show outputs. Text and alternative text stay text."""
    shown = []
    for kind, content, figure in outputs:
        if kind == "text":
            text = content.removesuffix("\n")
            block = nodes.literal_block(text, text, language="none")
            block["classes"].append("sphx-glr-script-out")
            shown.append(block)
        else:
            shown.append(image(*figure))
    return shown


def tab_set(entries):
    """Synchronized tabs, from a list of (Source, nodes)."""
    entries = in_order(entries)
    labels = [runner.short_name(source.machine) for source, _ in entries]
    items = []
    for (source, content), label in zip(entries, labels, strict=True):
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
    tutorial = gallery.tutorial_of(app.env.docname)
    if not tutorial:
        return
    cells = gallery.code_cells(doctree)
    own = None
    if gallery.executes(app) and gallery.running_time(doctree) is not None:
        machine = figures.read(Path(app.srcdir, f"{app.env.docname}.py"))["machine"]
        own = Source(machine, OWN, [own_outputs(shown) for _, shown in cells])
    known = list(recorded(app, tutorial, own))
    doctree["recorded"] = [
        (path.relative_to(runner.ROOT).as_posix(), source.machine, *rest)
        for path, source, *rest in known
    ]
    sources = [source for _, source, *_ in known if source.outputs]
    sources += [own] * (own is not None)
    for number, (block, former) in enumerate(cells):
        for node in former:
            block.parent.remove(node)
        having = [source for source in sources if number < len(source.outputs)]
        contents = [[o[:2] for o in source.outputs[number]] for source in having]
        if not any(contents):
            continue
        entries = [(source, output_nodes(source.outputs[number])) for source in having]
        agree = len(having) == len(sources) and all(c == contents[0] for c in contents)
        alone = agree or [source.name for source in having] == [OWN]
        at = block.parent.index(block) + 1
        block.parent[at:at] = entries[0][1] if alone else [tab_set(entries)]


def figures_of(app, tutorial):
    """Of each machine that shows a page's figures now: (Source, [(path, alt)])."""
    found, own = [], None
    note = Path(app.srcdir, gallery.GENERATED, f"{tutorial}.ran.json")
    if gallery.executes(app) and note.exists():
        ran = figures.read(note.with_name(note.name.replace(".ran.json", ".py")))
        own = Source(ran["machine"], OWN, [])
        drawn = [
            (Path(app.srcdir, uri.lstrip("/")), alt) for uri, alt in ran["figures"]
        ]
        found.append((own, drawn))
    for _, source, *_ in recorded(app, tutorial, own):
        outputs = [output for cell in source.outputs for output in cell]
        found.append(
            (source, [figure for kind, _, figure in outputs if kind == "figure"])
        )
    return in_order(found)


class TutorialFigure(SphinxDirective):
    """``.. tutorial-figure:: basics/plot_x 1``: a tutorial's figure, with a link to it.

    With the last sentence of its alternative text, which says what the run found, and
    a tab for each machine that has it. Where none has, a sentence says how to make it.
    """

    required_arguments = 2

    def run(self):
        tutorial, number = self.arguments[0], int(self.arguments[1])
        page = f"/{gallery.GENERATED}/{tutorial}"
        self.env.note_dependency(f"{page[1:]}.rst")
        entries = []
        for source, drawn in figures_of(self.env.app, tutorial):
            if len(drawn) >= number:
                path, alt = drawn[number - 1]
                figure = nodes.figure("", image(path, alt))
                link, _ = self.parse_inline(f":doc:`{page}`")
                where = nodes.Text(f", on {runner.describe(source.machine)}.")
                found = nodes.strong("", alt.rstrip(".").rpartition(". ")[2] + ".")
                words = [found, nodes.Text(" From "), *link, where]
                figure += nodes.caption("", "", *words)
                entries.append((source, [figure]))
        if not entries:
            text = f"The figure of :doc:`{page}` appears here after ``make html``."
            return self.parse_text_to_nodes(text)
        return entries[0][1] if len(entries) == 1 else [tab_set(entries)]


def setup(app):
    app.add_directive("tutorial-figure", TutorialFigure)
    app.connect("builder-inited", read_all, priority=101)  # before scripts run
    app.connect("env-get-outdated", outdated)
    # Before page_head, before Sphinx collects images and downloads, before tidy.
    app.connect("doctree-read", join, priority=301)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
