"""Outputs of several machines on one page: recorded by the runner, joined here.

A recording is an executed notebook (see ``runner.py``): recordings/ holds those of
other machines, _build/runs those of the machine that builds the site. Its outputs stand
under the code cells for as long as a cell and all code before it are the same; what
comes after is not shown. An outdated recording shows nothing where one of its kind,
with or without an accelerator, is current. Where all machines agree, one output stands;
where they differ, each has a tab, accelerators first, of the others the newest first.

Code that draws a figure is folded behind one line: drawing is not the lesson. It stays
in the page: search finds it, the keyboard opens it, print shows it (see site.css).
"""

import hashlib
import re
from pathlib import Path
from typing import ClassVar, NamedTuple

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective
from sphinx_design.shared import create_component

import runner
from _ext import gallery

FIGURES = Path("_build", "recorded")  # recorded figures as files, for <img>
FOLD = '<details class="figure-code"><summary>Code of this figure</summary>'
CLASSES = ["dark-light", "tutorial-figure"]  # dark-light: the theme leaves it as it is


class Source(NamedTuple):
    """One machine's outputs of one page."""

    path: Path
    machine: dict
    seconds: float
    current: int  # so many code cells still hold
    outputs: list  # for each code cell that is shown (text, [(SVG, alternative text)])

    @property
    def name(self):
        return self.path.parts[-3]

    @property
    def has_accelerator(self):
        return self.machine["accelerator"] is not None


# --- reading ----------------------------------------------------------------------


def read_all(app):
    """Read and check every recording before pages are made."""
    app.recordings = {}
    for folder in [runner.RECORDINGS, runner.RUNS]:
        for path in sorted(folder.glob("*/*/*.ipynb")):
            page = runner.TUTORIALS.joinpath(*path.parts[-2:]).with_suffix(".py")
            if page.exists():
                try:
                    app.recordings[path] = runner.read(path)
                except ValueError as problem:
                    raise ExtensionError(str(problem)) from None
            elif folder == runner.RECORDINGS:
                name = path.relative_to(runner.ROOT)
                raise ExtensionError(f"{name} is of a tutorial that is gone: git rm it")


def outdated(app, env, added, changed, removed):
    """Pages to read again because a recording came, went or changed."""
    state = {str(path): path.read_bytes() for path in app.recordings}
    state = {path: hashlib.sha256(content).digest() for path, content in state.items()}
    before, env.recordings_state = getattr(env, "recordings_state", {}), state
    return env.found_docs if state != before else []


def cells_of(tutorial):
    text = (runner.TUTORIALS / f"{tutorial}.py").read_text(encoding="utf-8")
    return runner.split(text)


def recorded(app, tutorial):
    """The Sources of a page, in the order of their tabs.

    Of this machine's run and its recording only the one that holds for more cells.
    """
    cells, found = cells_of(tutorial), []
    total = len(runner.code_of(cells))
    for path, recording in app.recordings.items():
        if path.match(f"{tutorial}.ipynb"):
            current = runner.current(recording, cells)
            machine, seconds, _, outputs = recording
            found.append(Source(path, machine, seconds, current, outputs[:current]))

    def rank(source):
        return source.current, source.path.is_relative_to(runner.RUNS)

    def better(source, other):
        same = runner.hardware(source.machine) == runner.hardware(other.machine)
        places = rank(source)[1] != rank(other)[1]
        return same and places and rank(other) > rank(source)

    found = [s for s in found if not any(better(s, other) for other in found)]
    kinds = {s.has_accelerator for s in found if s.current == total}
    for number, source in enumerate(found):
        if source.current < total and source.has_accelerator in kinds:
            found[number] = source._replace(outputs=[])
    newest = sorted(found, key=lambda source: source.machine["date"], reverse=True)
    return sorted(newest, key=lambda source: not source.has_accelerator)


# --- showing ----------------------------------------------------------------------


def figure_file(svg):
    """A recorded figure as a file."""
    name = hashlib.sha256(svg.encode()).hexdigest()[:16]
    path = runner.ROOT / FIGURES / f"{name}.svg"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(svg, encoding="utf-8")
    return path


def image(svg, alt):
    """A figure; its size keeps its place on the page free until it is loaded."""
    uri = "/" + figure_file(svg).relative_to(runner.ROOT).as_posix()
    box = re.search(r'viewBox="[\d.]+ [\d.]+ ([\d.]+) ([\d.]+)"', svg)
    width, height = (str(round(float(points) * 4 / 3)) for points in box.groups())
    size = {"width": width, "height": height, "loading": "lazy"}
    return nodes.image(uri=uri, alt=alt, classes=list(CLASSES), **size)


def output_nodes(text, figures):
    """The nodes that show what a cell printed and drew. Text stays text."""
    shown = [image(svg, alt) for svg, alt in figures]
    if text := text.removesuffix("\n"):
        block = nodes.literal_block(text, text, language="none")
        block["classes"].append("sphx-glr-script-out")
        shown.append(block)
    return shown


def tab_set(entries):
    """Synchronized tabs, from a list of (Source, nodes)."""
    labels = [runner.short_name(source.machine) for source, _ in entries]
    items = []
    for (source, content), label in zip(entries, labels, strict=True):
        if labels.count(label) > 1:
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


def fold(block):
    """Fold a cell behind one line if it draws a figure."""
    if runner.draws(block.astext()):
        at = block.parent.index(block)
        block.parent.insert(at + 1, nodes.raw("", "</details>", format="html"))
        block.parent.insert(at, nodes.raw("", FOLD, format="html"))


def join(app, doctree):
    """Put the outputs of all machines under each code cell of a tutorial's page."""
    tutorial = gallery.tutorial_of(app.env.docname)
    if not tutorial:
        return
    sources = [source for source in recorded(app, tutorial) if source.outputs]
    total = len(runner.code_of(cells_of(tutorial)))
    for number, block in enumerate(gallery.code_cells(doctree, total)):
        having = [source for source in sources if number < len(source.outputs)]
        contents = [source.outputs[number] for source in having]
        if any(any(content) for content in contents):
            agree = len(having) == len(sources) and all(
                content == contents[0] for content in contents
            )
            entries = [(s, output_nodes(*s.outputs[number])) for s in having]
            at = block.parent.index(block) + 1
            block.parent[at:at] = entries[0][1] if agree else [tab_set(entries)]
        fold(block)


def figures_of(app, tutorial):
    """Of each machine that shows a page's figures now: (Source, [(path, alt)])."""
    for source in recorded(app, tutorial):
        drawn = [figure for _, figures in source.outputs for figure in figures]
        yield source, [(figure_file(svg), alt) for svg, alt in drawn]


class TutorialFigure(SphinxDirective):
    """``.. tutorial-figure:: basics/plot_x 1``: a tutorial's figure, with a link to it.

    With the last sentence of its alternative text, which says what the run found, and
    a tab for each machine that has it. Where none has, a sentence says how to make it.
    With ``:words:`` the figure is left out, and the words stand alone.
    """

    required_arguments = 2
    option_spec: ClassVar = {"words": directives.flag}

    def run(self):
        tutorial, number = self.arguments[0], int(self.arguments[1])
        page = f"/{gallery.GENERATED}/{tutorial}"
        self.env.note_dependency(f"{page[1:]}.rst")
        entries = []
        for source, drawn in figures_of(self.env.app, tutorial):
            if len(drawn) >= number:
                path, alt = drawn[number - 1]
                link, _ = self.parse_inline(f":doc:`{page}`")
                where = nodes.Text(f", on {runner.describe(source.machine)}.")
                found = nodes.strong("", alt.rstrip(".").rpartition(". ")[2] + ".")
                words = [found, nodes.Text(" From "), *link, where]
                if "words" in self.options:
                    shown = nodes.paragraph("", "", *words)
                else:
                    shown = nodes.figure("", image(path.read_text("utf-8"), alt))
                    shown += nodes.caption("", "", *words)
                entries.append((source, [shown]))
        if not entries:
            text = f"The figure of :doc:`{page}` appears here after ``make html``."
            return self.parse_text_to_nodes(text)
        return entries[0][1] if len(entries) == 1 else [tab_set(entries)]


def setup(app):
    app.add_directive("tutorial-figure", TutorialFigure)
    app.connect("builder-inited", read_all, priority=101)  # after the gallery
    app.connect("env-get-outdated", outdated)
    # Before Sphinx collects images and downloads, before tidy.
    app.connect("doctree-read", join, priority=301)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
